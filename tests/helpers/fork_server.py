"""The fork server: a process that has imported everything that a run may want, and forks a child for each
command line and each rank. Its client is `forked.py`.

`python -m helpers.fork_server FD` reads requests from the socket FD, one JSON object a line: `name`, `target`
(MODULE:FUNCTION), `args`, `cwd`, `env`, and the files `input`, `output`, `errors`. It answers with a line
when the child is there, `{"name": ..., "pid": ...}`, and one when it has ended, `{"name": ..., "code": ...}`;
a child that a signal ended has minus the signal's number. What a child starts with is what an interpreter has
after its imports: the server never makes a tensor, a process group or a thread. When the socket closes, the
server ends every child with its whole session, and then itself. `FD light` is a server without the imports.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

HEAVY = (
    "torch", "transformers", "deepspeed", "datasets", "peft", "wandb", "matplotlib.pyplot",
    "matplotlib.backends.backend_agg", "safetensors.torch", "transformers.models.llama.modeling_llama",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    # What DeepSpeed imports when an engine is made, more than a second of it for its Muon optimizer alone.
    "setuptools", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.superoffload.superoffload_stage3",
)  # fmt: skip
PR_SET_PDEATHSIG = 1


def import_everything() -> None:
    """The heavy libraries, every module of rcpo but the scripts of rcpo.builtin, and the ranks of tests."""
    for name in HEAVY:
        importlib.import_module(name)
    import rcpo

    for module in pkgutil.walk_packages(rcpo.__path__, "rcpo."):
        if not module.name.startswith("rcpo.builtin."):
            importlib.import_module(module.name)
    importlib.import_module("helpers.rank_runs")
    from hydra.core.plugins import Plugins

    Plugins.instance()  # finds Hydra's own plugins, which takes as long as a small command


class Server:
    """Forks what it is asked for; `serve` returns when the client has gone."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._names: dict[int, str] = {}
        """Children that run, by process id."""
        self._libc = ctypes.CDLL(None)

    def serve(self) -> None:
        woken, wakes = os.pipe()
        for end in (woken, wakes):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakes)
        selector = selectors.DefaultSelector()
        selector.register(self._client, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        waiting = b""
        while True:
            for key, _ in selector.select():
                if key.fileobj is self._client:
                    received = self._client.recv(1 << 16)
                    if not received:
                        return self._end_children()
                    *lines, waiting = (waiting + received).split(b"\n")
                    for line in lines:
                        self._fork(json.loads(line))
                else:
                    with contextlib.suppress(BlockingIOError):
                        os.read(woken, 1 << 16)
            self._reap()

    def _say(self, **answer: object) -> None:
        with contextlib.suppress(OSError):  # the client has gone; `serve` finds out
            self._client.sendall(json.dumps(answer).encode() + b"\n")

    def _fork(self, request: dict[str, Any]) -> None:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            self._client.close()
            self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            be_the_child(request)
        self._names[child] = request["name"]
        self._say(name=request["name"], pid=child)

    def _reap(self) -> None:
        while self._names:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            name = self._names.pop(child, None)
            if name is not None:
                self._say(name=name, code=os.waitstatus_to_exitcode(status))

    def _end_children(self) -> None:
        for child in self._names:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)


def be_the_child(request: dict[str, Any]) -> NoReturn:
    """Become the process that was asked for."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, name in enumerate((request["input"], request["output"], request["errors"])):
        opened = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["cwd"])
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    module, _, function = request["target"].partition(":")
    call_and_exit(
        lambda: getattr(importlib.import_module(module), function)(*request["args"]), request["env"]
    )


def call_and_exit(call: Callable[[], object], env: Mapping[str, str]) -> NoReturn:
    """Be a process that does this and nothing else, with what an interpreter does at its end: it waits for
    threads, runs the exit handlers and flushes."""
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # temporary folders are the parent's
    if (media := sys.modules.get("wandb.sdk.data_types._private")) is not None:
        media.MEDIA_TMP.name = tempfile.mkdtemp("wandb-media")  # which an exit handler of wandb's removes
    os.environ.clear()
    os.environ.update(env)
    if encoding := env.get("PYTHONIOENCODING"):
        sys.stdout.reconfigure(encoding=encoding)  # type: ignore[union-attr]
    code = 1
    try:
        code = exit_code(call())
    except SystemExit as stop:
        code = exit_code(stop.code)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


class ForkingPopen(subprocess.Popen):  # type: ignore[type-arg]
    """subprocess.Popen in the children: `python -m rcpo.MODULE WORDS` is a fork that runs the module's
    `main`, so that the ranks of a launch and the cells of a sweep import nothing either."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        if not (isinstance(args, list) and args[:2] == [sys.executable, "-m"] and args[2][:5] == "rcpo."):
            super()._execute_child(args, *more)  # type: ignore[misc]
            return
        names = inspect.signature(super()._execute_child).parameters  # type: ignore[misc]
        given = dict(zip(list(names)[1:], more, strict=True))
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be_the_module(args[2], args[3:], given)
        self._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]

    def _be_the_module(self, module: str, words: list[str], given: dict[str, Any]) -> NoReturn:
        """What execve and an interpreter's start do: no signal has a handler, only the given files are
        open."""
        if given["start_new_session"]:
            os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
        for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
            if given[name] >= 0:
                os.dup2(given[name], number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        if given["cwd"] is not None:
            os.chdir(given["cwd"])
        env = os.environ if given["env"] is None else given["env"]
        sys.argv = [module, *words]
        call_and_exit(lambda: importlib.import_module(module).main(words), dict(env))


def exit_code(value: object) -> int:
    """What an interpreter makes of the value of a SystemExit."""
    if value is None or isinstance(value, int):
        return int(value or 0) & 0xFF
    print(value, file=sys.stderr)
    return 1


def command_line(*words: str) -> None:
    """`rcpo WORDS`, as its console script runs it."""
    from rcpo import cli

    sys.argv = ["rcpo", *words]
    cli.main()


def script(code: str, *words: str) -> None:
    """`python -c CODE WORDS`."""
    sys.argv = ["-c", *words]
    exec(compile(code, "<script of a test>", "exec"), {"__name__": "__main__"})


def main() -> None:
    client = socket.socket(fileno=int(sys.argv[1]))
    client.set_inheritable(False)
    if "light" not in sys.argv[2:]:
        import_everything()
    threads = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
    assert len(threads) == 1, f"a thread would be lost in every child: {threads}"
    gc.collect()
    gc.freeze()  # or the first collection in a child copies every page
    Server(client).serve()


if __name__ == "__main__":
    main()
