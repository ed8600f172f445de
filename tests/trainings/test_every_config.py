"""Invariant 12, second half: every shipped option trains one step, from words on the command line to final/.

Two processes run a half of them each, one after another.
`tests/config/test_config.py` holds the first half: every option composes and validates.
"""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers import forked
from helpers.selection import asked_for, matrix
from rcpo.common.conf import conf_dir
from rcpo.models.load import model_place
from rcpo.runs.folder import RunFolder

RUN_ALL = """
import json, sys, traceback
import torch
from rcpo.commands.train import prepare
from rcpo.ranks.distributed import initialize, shut_down
from rcpo.training.read_inputs import read_inputs
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree
from rcpo.training.loop import train
from helpers.rank_runs import draw_nothing

draw_nothing()
device = initialize("cpu")
answers = {}
for name, words in json.load(sys.stdin).items():
    try:
        config = prepare(words)
        run = RunFolder(config.run_dir)
        run.create(config, config_tree(config))
        train(config, run, read_inputs(config), device, resume=False)
        answers[name] = "trained"
    except Exception as error:
        answers[name] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
shut_down()
json.dump(answers, open(sys.argv[1], "w"))
"""
"""What `rcpo.launch.start` and `rcpo.launch.worker` do for one run, with one process group for many."""
SMALL = ["tracking=none", "train.steps=1", "train.pairs_per_step=4", "train.max_length=64",
         "train.eval_every=0"]  # fmt: skip
FEW = ["data.train_pairs=32", "data.eval_pairs=8"]
FILE = ["data.path=pairs.jsonl", "data.split=null", "data.eval_split=null", *FEW]
"""A local file in place of the hub's data sets, which take the same code path."""
TINY = f"model.path={model_place('builtin:tiny')}"
"""The embedded model as a local folder, in place of a model on the hub."""
NEEDED = {
    "data/file": FILE,
    "data/hh_rlhf": FILE,
    "data/mmpr": [*FILE, "data.columns=null"],
    "data/rlaif_v": [*FILE, "data.columns=null"],
    "data/shapes": [*FEW, "model=tiny_vision"],
    "data/ultrafeedback": FILE,
    "optim/sgd": ["optim.lr=0.01"],
    "calibration/fixed": ["calibration.alpha=1.2"],
}
"""What an option leaves to the user."""
SHIPPED = sorted(
    str(path.relative_to(conf_dir()).with_suffix(""))
    for path in conf_dir().glob("*/*.yaml")
    # Elsewhere: SLURM's profiles in `tests/sweep/test_slurm_script.py`, 8 bits in `test_optimizers.py` here.
    if path.parent.name != "cluster" and path.stem != "adamw_8bit"
)


def words_for(name: str) -> list[str]:
    """A command line of one step with this option; a later word wins over an earlier one."""
    data = [] if name.startswith("data/") and name in NEEDED else FEW
    model = [TINY] if name.startswith("model/") and name != "model/tiny" else []
    return [*SMALL, *data, name.replace("/", "="), *model, *NEEDED.get(name, []),
            f"run_dir=runs/{name.replace('/', '-')}"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    """Where the runs are, and how each ended."""
    folder = tmp_path_factory.mktemp("every-config")
    pairs = [
        {"prompt": f"what is {number} ?", "chosen": "it is right .", "rejected": f"it is {number} ."}
        for number in ("one", "two", "three", "four", "five", "six", "seven", "eight") * 5
    ]
    for number, pair in enumerate(pairs):
        pair["chosen"] += " yes" * (number // 8)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    children = []
    asked = [params["name"] for params in asked_for(request) if "name" in params]
    for file, half in (("even", asked[::2]), ("odd", asked[1::2])):
        lines = json.dumps({name: words_for(name) for name in half})
        children.append(forked.start_script(RUN_ALL, file, cwd=folder, input=lines))
    for child in children:
        done = child.completed(240)
        assert done.returncode == 0, done.stderr[-3000:]
    even, odd = (json.loads((folder / file).read_text()) for file in ("even", "odd"))
    return folder / "runs", even | odd


@pytest.mark.parametrize("name", matrix(SHIPPED, SHIPPED[::3].__contains__, "every shipped option"))
def test_every_shipped_option_trains_one_step(trained: tuple[Path, dict[str, str]], name: str) -> None:
    """One row with a finite loss, the held-out pairs before and after it, and weights that moved."""
    runs, answers = trained
    assert answers[name] == "trained"
    run = RunFolder(runs / name.replace("/", "-"))
    (row,) = run.rows(run.metrics)
    assert row["step"] == 1
    assert math.isfinite(row["train/loss"])
    assert 0 < row["train/grad_norm"] < math.inf
    assert [line["step"] for line in run.rows(run.eval)] == [0, 1]
    model = "builtin:tiny_vision" if name == "data/shapes" else "builtin:tiny"
    before = load_file(Path(model_place(model)) / "model.safetensors")
    after = load_file(run.final / "model.safetensors")
    assert before.keys() == after.keys()
    assert any(not before[key].equal(after[key]) for key in before)
