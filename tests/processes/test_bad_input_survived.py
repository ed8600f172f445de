"""Input that is odd and trains all the same: what is cut, dropped or missing is said, W&B may fail, and
an old run is replaced only where the user asks for it. Real runs of one step."""

import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from helpers import forked
from helpers.bad_input_folder import make_folder
from helpers.command_lines import Answer, run_all
from rcpo.common.locks import hold, run_lock

pytestmark = pytest.mark.ci("odd input")
KEY = "0" * 40
SMALL = "train.steps=1 train.eval_every=0 train.pairs_per_step=4 data.eval_pairs=4 tracking=none"
FILE = f"train data=file {SMALL}"
MADE = f"train data.train_pairs=16 {SMALL}"
SAME = "optim.lr=1e-4 train.pairs_per_device=4"
"""What has another default where the model is not the embedded one."""
RUNS = {
    "no-pad": f"{MADE} model.path=no-pad run_dir=out/no-pad",
    "no-eos": f"{MADE} model.path=no-eos run_dir=out/no-eos",
    "no-template": f"{MADE} model.path=no-template model.chat_template=plain run_dir=out/no-template",
    "pickled": f"{MADE} model.path=pickled model.allow_pickle=true run_dir=out/pickled {SAME}",
    "safe": f"{MADE} run_dir=out/safe {SAME}",
    "dropped": f"{FILE} data.path=some-nulls.jsonl run_dir=out/dropped",
    "prompts": f"{FILE} data.path=good.jsonl train.max_prompt_length=6 run_dir=out/prompts",
    "responses": f"{MADE} train.max_length=18 train.max_prompt_length=12 run_dir=out/responses",
    "number": f"{MADE} name=123 run_dir=out/number",
    "refused-key": f"{MADE.replace('tracking=none', 'tracking=wandb')} run_dir=out/refused-key",
    "old": f"{MADE} run_dir=out/again train.save_every=1",
    "unasked": f"{MADE} run_dir=out/again",
    "again": f"{MADE} run_dir=out/again objective=simpo --overwrite",
    "first": f"{MADE} run_dir=out/first --overwrite",
    "in-empty": f"{MADE} run_dir=empty-folder --overwrite",
}
"""What is run, in this order."""


class Refusing(BaseHTTPRequestHandler):
    """A W&B server that takes no key."""

    def do_POST(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "invalid API key"}]}')

    do_GET = do_POST  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def refusing_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("survived")
    make_folder(made)
    return made


@pytest.fixture(scope="module")
def answers(folder: Path, refusing_server: str) -> dict[str, Answer]:
    cases = {name: shlex.split(line) for name, line in RUNS.items()}
    env = {
        "RCPO_CACHE": str(folder.with_name("survived-cache")), "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": refusing_server,
    }  # fmt: skip
    return run_all(cases, [folder], env)


def log(folder: Path, name: str) -> str:
    return (folder / "out" / name / "logs/rank-0000.log").read_text()


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("unasked", "refused-key")])
def test_odd_input_trains_without_a_warning(answers: dict[str, Answer], name: str) -> None:
    assert (answers[name].code, answers[name].said) == (0, "")


def test_what_was_dropped_or_cut_is_in_the_log(answers: dict[str, Answer], folder: Path) -> None:
    assert "1 dropped because rejected is null (row 40)" in log(folder, "dropped")
    assert "training pairs: 36 prompts cut from the left (train.max_prompt_length=6)" in log(
        folder, "prompts"
    )
    assert "responses cut from the right (train.max_length=18)" in log(folder, "responses")


def test_pickled_weights_train_as_the_same_weights_in_safetensors_do(
    answers: dict[str, Answer], folder: Path
) -> None:
    pickled, safe = (
        load_file(folder / "out" / name / "final/model.safetensors") for name in ("pickled", "safe")
    )
    assert set(pickled) == set(safe)
    assert all(pickled[name].equal(safe[name]) for name in safe)


def test_the_frozen_config_names_local_files_absolutely(answers: dict[str, Answer], folder: Path) -> None:
    """So that a run is resumed from any folder; `plain` is no file."""
    config = yaml.safe_load((folder / "out/no-template/config.yaml").read_text())
    assert config["model"]["path"] == str(folder / "no-template")
    assert config["model"]["chat_template"] == "plain"
    config = yaml.safe_load((folder / "out/dropped/config.yaml").read_text())
    assert config["data"]["path"] == str(folder / "some-nulls.jsonl")


def test_a_key_that_wandb_refuses_is_one_warning_and_offline_tracking(
    answers: dict[str, Answer], folder: Path
) -> None:
    answer = answers["refused-key"]
    assert answer.code == 0, answer.said
    lines = [line for line in answer.said.splitlines() if not line.startswith("wandb: ")]
    assert len(lines) == 1, answer.said
    assert lines[0].startswith("rcpo: warning: W&B failed (")
    assert lines[0].endswith("; tracking offline")
    assert list((folder / "out/refused-key/wandb").glob("offline-run-*"))


def test_a_run_is_replaced_where_that_is_asked_for_and_only_there(
    answers: dict[str, Answer], folder: Path
) -> None:
    """The old run had a checkpoint and another objective; nothing of it is left, and nothing lies beside."""
    assert (answers["unasked"].code, answers["unasked"].changes) == (2, [])
    run = folder / "out/again"
    assert yaml.safe_load((run / "config.yaml").read_text())["objective"]["name"] == "simpo"
    assert list((run / "checkpoints").iterdir()) == []
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert not [path.name for path in run.parent.iterdir() if path.name.startswith(".")]
    assert (folder / "out/first/final").is_dir()
    assert (folder / "empty-folder/final").is_dir()


def test_a_run_that_is_being_trained_is_not_replaced(answers: dict[str, Answer], folder: Path) -> None:
    with hold(run_lock(folder / "out/first")):
        done = forked.rcpo(*shlex.split(RUNS["first"]), cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"rcpo: run_dir={folder}/out/first: is being trained by process ")
    assert done.stderr.endswith("; stop that one first, or type another name=... or run_dir=...\n")
    assert (folder / "out/first/final").is_dir()


ON_A_GPU_MACHINE = """
import sys
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
set_accelerator(CUDA_Accelerator())  # what DeepSpeed would have chosen there
from rcpo import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as stop:
    assert get_accelerator().device_name() == "cpu"
    sys.exit(stop.code)
"""


@pytest.mark.timeout(200)
def test_a_cpu_run_uses_the_cpu_where_deepspeed_has_chosen_a_gpu(tmp_path: Path) -> None:
    words = shlex.split(f"{MADE} train.device=cpu run_dir=out")
    done = forked.script(ON_A_GPU_MACHINE, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
