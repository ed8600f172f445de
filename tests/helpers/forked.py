"""Processes that cost no imports: command lines and ranks from the session's fork server, and plain forks of
the test's own process.

The server (`fork_server.py`), one for a pytest session, starts with the first request, or once tests are
collected that will ask; `close` ends it with all its children.
"""

import contextlib
import importlib
import itertools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

from helpers import ROOT
from helpers.fork_server import HEAVY

SECONDS_TO_START = 120
LANES = 2
"""Children that run at once."""
IMPORTED_WITH = {
    "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator would start a thread
}  # fmt: skip
"""What libraries read when they are imported: the same for every child, whatever its own environment says."""


class Child:
    """A process that the server has forked."""

    def __init__(self, server: "ForkServer", name: str, output: Path, errors: Path) -> None:
        self._server, self._name = server, name
        self.output, self.errors = output, errors
        self.pid: int | None = None
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        self._server.listen(0)
        return self.code

    def wait(self, seconds: float) -> int:
        """The exit code; a child that takes longer is ended, and the test with it."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            left = deadline - time.monotonic()
            if left <= 0:
                self.kill()
                raise AssertionError(f"{self._name}: not done within {seconds} s\n{self.said()}")
            self._server.listen(left)
        return self.code

    def started(self) -> int:
        """Its process id, once there is one."""
        while self.pid is None:
            self._server.listen(SECONDS_TO_START)
        return self.pid

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.started(), number)

    def kill(self) -> None:
        """End it and all that it has started in its session; returns when it has ended."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.started(), signal.SIGKILL)
        while self.code is None:
            self._server.listen(SECONDS_TO_START)

    def completed(self, seconds: float) -> CompletedProcess[str]:
        """Wait for its end, and read what it has said."""
        code = self.wait(seconds)
        texts = (path.read_text(errors="replace") for path in (self.output, self.errors))
        return CompletedProcess(self._name, code, *texts)

    def said(self) -> str:
        """The end of both outputs."""
        paths = dict.fromkeys((self.output, self.errors))
        return "\n".join(path.read_text(errors="replace")[-4000:] for path in paths if path.exists())


class ForkServer:
    """The client's end."""

    def __init__(self, light: bool = False) -> None:
        """`light`: nothing is imported."""
        self._socket, other = socket.socketpair()
        self._numbers = itertools.count()
        self._children: dict[str, Child] = {}
        self._waiting = b""
        self.folder = Path(tempfile.mkdtemp(prefix="rcpo-tests-"))
        self._log = self.folder / "server.log"
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with other, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.fork_server", str(other.fileno()), *["light"] * light],
                env=os.environ | IMPORTED_WITH | {"PYTHONPATH": os.pathsep.join(paths)},
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[other.fileno()],
                start_new_session=True,
            )  # fmt: skip

    def start(
        self,
        target: str,
        *args: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
        output: Path | None = None,
        errors: Path | None = None,
    ) -> Child:
        """Fork a child that calls `target` (MODULE:FUNCTION) with `args`, in `cwd` with the environment `env`
        (default: this process's), `input` to read, and its outputs appended to files."""
        name = f"{next(self._numbers)}-{target.rpartition(':')[2]}"
        output = output or self.folder / f"{name}.out"
        child = self._children[name] = Child(self, name, output, errors or output.with_suffix(".err"))
        source = Path(os.devnull)
        if input is not None:
            source = self.folder / f"{name}.in"
            source.write_text(input)
        request = {
            "name": name, "target": target, "args": args, "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env), "input": str(source),
            "output": str(child.output), "errors": str(child.errors),
        }  # fmt: skip
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise AssertionError(self._why_it_ended()) from None
        return child

    def listen(self, seconds: float) -> None:
        """Take in what the server has to say; waits for it, `seconds` at most."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            if not selector.select(seconds):
                return
        received = self._socket.recv(1 << 16)
        assert received, self._why_it_ended()
        *lines, self._waiting = (self._waiting + received).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "pid" in answer:
                self._children[answer["name"]].pid = answer["pid"]
            else:
                self._children.pop(answer["name"]).code = answer["code"]

    def _why_it_ended(self) -> str:
        return f"the fork server has ended:\n{self._log.read_text()[-4000:]}"

    def close(self) -> None:
        """End the server and its children, and remove what they have said."""
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_server: ForkServer | None = None


def server() -> ForkServer:
    """The session's fork server."""
    global _server
    if _server is None:
        _server = ForkServer()
    return _server


def close() -> None:
    global _server
    if _server is not None:
        _server.close()
        _server = None


def start_rcpo(
    *words: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    output: Path | None = None,
    errors: Path | None = None,
) -> Child:
    """Start `rcpo WORDS` in a forked child."""
    target = "helpers.fork_server:command_line"
    return server().start(target, *map(str, words), cwd=cwd, env=env, output=output, errors=errors)


def rcpo(
    *words: object, cwd: Path, env: Mapping[str, str] | None = None, seconds: float = 120
) -> CompletedProcess[str]:
    """Run `rcpo WORDS` in a forked child to its end."""
    return start_rcpo(*words, cwd=cwd, env=env).completed(seconds)


def rcpo_all(
    lines: Mapping[str, Sequence[object]], *, cwd: Path, env: Mapping[str, str] | None = None
) -> dict[str, CompletedProcess[str]]:
    """Run many command lines to their ends, two at a time."""
    waiting, running, done = list(lines.items()), dict[str, Child](), dict[str, CompletedProcess[str]]()
    while waiting or running:
        while waiting and len(running) < LANES:
            name, words = waiting.pop(0)
            running[name] = start_rcpo(*words, cwd=cwd, env=env)
        server().listen(SECONDS_TO_START)
        for name in [name for name, child in running.items() if child.poll() is not None]:
            done[name] = running.pop(name).completed(0)
    return done


def start_script(
    code: str,
    *words: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    output: Path | None = None,
) -> Child:
    """Start `python -c CODE WORDS` in a forked child."""
    target = "helpers.fork_server:script"
    return server().start(target, code, *map(str, words), cwd=cwd, env=env, input=input, output=output)


def script(
    code: str,
    *words: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    output: Path | None = None,
    seconds: float = 120,
) -> CompletedProcess[str]:
    """Run `python -c CODE WORDS` in a forked child to its end."""
    return start_script(code, *words, cwd=cwd, env=env, input=input, output=output).completed(seconds)


def in_a_fork(work: Callable[[], None]) -> None:
    """Run `work` in a fork of this process; its AssertionError is this test's."""
    for name in HEAVY:
        importlib.import_module(name)  # once, and not in every fork
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}"[:4000].encode())
            os._exit(1)
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    said = os.read(reader, 4000).decode()
    os.close(reader)
    assert status == 0, said
