"""Many command lines, each through the whole of `rcpo.cli.main` in a forked process of its own.

`python bad_input_runs.py` imports everything heavy once, reads command lines from standard input (JSON: a
name and its words, each), forks a process for each and answers with exit code, both outputs and what it did
to the folder that it ran in. `run_all` starts it.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

SECONDS_PER_CASE = 60


@dataclass(frozen=True)
class Answer:
    """What one command line did."""

    code: int
    output: str
    said: str
    """Standard error."""
    changes: list[str]
    """Files and folders that it made, changed or removed in its working directory, by relative path."""


def run_all(
    cases: dict[str, list[str]], folder: Path, env: dict[str, str], timeout_seconds: float
) -> dict[str, Answer]:
    """Run every command line in `folder`, one after the other."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | env,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: Answer(**answer) for name, answer in answers.items()}


def contents(folder: Path) -> dict[str, str]:
    """Every file and folder below `folder`, with what would change if it were touched."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        kind = "folder" if path.is_dir() else f"{stat.st_size} bytes, {stat.st_mtime_ns}, inode {stat.st_ino}"
        found[str(path.relative_to(folder))] = kind
    return found


def run_one(words: list[str]) -> Answer:
    """Fork, run `words`, and look at what became of the working directory."""
    from rcpo import cli

    before = contents(Path.cwd())
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(SECONDS_PER_CASE)
            code = 1
            try:
                cli.main(words)
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    after = contents(Path.cwd())
    changes = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return Answer(os.waitstatus_to_exitcode(status), texts[0], texts[1], changes)


def main() -> None:
    """Answer what standard input asks."""
    cases: dict[str, list[str]] = json.load(sys.stdin)
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401

    import rcpo.launch.start
    import rcpo.training.loop  # noqa: F401
    from rcpo.commands.train import prepare
    from rcpo.training.read_inputs import read_inputs

    config = prepare(["data.train_pairs=16", "data.eval_pairs=8", "tracking=none"])
    assert config is not None
    read_inputs(config)  # what it imports, no child has to
    gc.freeze()
    answers = {name: run_one(words).__dict__ for name, words in cases.items()}
    print("\n" + json.dumps(answers))


if __name__ == "__main__":
    main()
