"""Commands of READMEs, run small: a folder with what their placeholders name, a child for each command."""

import gzip
import json
import os
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import yaml

from helpers import ROOT, forked
from helpers.readmes import code, words
from rcpo.models.load import model_place
from rcpo.records.arithmetic import arithmetic_records

SMALL = ("train.steps=2", "train.pairs_per_step=4", "train.eval_every=1", "train.save_every=1",
         "data.eval_pairs=8", "data.train_pairs=128", "tracking=none")  # fmt: skip
"""Further words of `rcpo train`."""
SWEEP = {"overrides": list(SMALL), "axes": {"objective": ["dpo"], "calibration": ["off", "on"]}, "seeds": [0]}
"""What stands in for the sweeps of sweeps/: two cells of two steps."""
SEARCH = SWEEP | {
    "axes": {"optim.lr": {"type": "float", "low": 1e-4, "high": 1e-3, "log": True}},
    "search": {"metric": "eval/displacement/margin", "direction": "maximize", "trials": 2},
}
"""The same of a search: two trials."""
FIRST_RUN = "runs/RUN"
"""Where the first `rcpo train` goes."""
STANDS_FOR = {
    "RUN": FIRST_RUN, "FILE": "sweeps/demo.yaml", "SWEEP": "sweeps-out/demo", "PICTURE": "picture.png",
    "TITLE": "a title", "demo": "sweeps/demo.yaml", "seed=range(3)": "seed=range(1)",
    "step-000100": "step-000002", "calibration=off,balance": "calibration=balance",
    "optim.lr=7.5e-5,3e-4,1.2e-3": "optim.lr=3e-4", "train.pairs_per_step=4,16,32": "train.pairs_per_step=4",
}  # fmt: skip
SECONDS = 120
"""The longest that a command may take."""


LIBRARY = """
import json
rows = [json.loads(line) for line in open("PAIRS.jsonl")]
"""
"""Names that the Python of a README begins with."""
SCRIPT = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
"""What `python FILE WORDS` does, in a process that runs already."""


def furnish(place: Path) -> None:
    """Make what the placeholders name: models, pairs, a sweep file, a folder of options. The first
    `rcpo train` makes RUN."""
    for name in ("MODEL", "SMOLLM2", "BASE", "SFT"):
        shutil.copytree(model_place("builtin:tiny"), place / name)
    records, _ = arithmetic_records(40, 8, seed=0)
    rows = []
    for record in records:
        pair = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
        again = {"question": record.prompt, "good": record.chosen, "bad": record.rejected, "NAME": 0.5}
        rows.append(json.dumps(pair | again) + "\n")
    (place / "PAIRS.jsonl").write_text("".join(rows))
    answers = [
        {"prompt": record.prompt, "completion": text, "label": label}
        for record in records
        for text, label in ((record.chosen, True), (record.rejected, False))
    ]
    (place / "ANSWERS.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    chats = [
        {"messages": [*one.prompt, *one.chosen, *other.prompt, *other.chosen]}
        for one, other in zip(records, [*records[1:], records[0]], strict=True)
    ]
    (place / "CHATS.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (place / "HH.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))
    for folder in ("sweeps", "DIR/objective"):
        (place / folder).mkdir(parents=True)
    for name in ("demo", "ches", "real", "lists", "noise", "sft_first", "vision"):
        (place / f"sweeps/{name}.yaml").write_text(yaml.safe_dump(SWEEP))
    (place / "sweeps/search.yaml").write_text(yaml.safe_dump(SEARCH))
    (place / "win_rates.csv").write_text("run,win_rate\nRUN,0.5\n")
    for paper in (ROOT / "sweeps").glob("paper_*.yaml"):  # for their dry run
        shutil.copy(paper, place / "sweeps")
    (place / "DIR/objective/mine.yaml").write_text("# My own.\nname: dpo\nbeta: 0.3\n")
    own = code(ROOT / "rcpo/objectives/README.md", "python")[0]
    (place / "my_losses.py").write_text(own)


def typed(command: str, number: int, place: Path) -> list[str]:
    """The words as they are run: names in place of placeholders, few steps, a script's absolute path."""
    line = [STANDS_FOR.get(word, word).replace("=RUN/", f"={FIRST_RUN}/") for word in words(command)]
    line = [f"OUT-{number}" if word == "OUT" else word for word in line]
    line = [str(ROOT / word) if word.startswith("tests/") else word for word in line]
    if "--html" in line:  # of few runs: each more is some seconds of drawing
        line = [STANDS_FOR["SWEEP"] if word == "runs" else word for word in line]
    if line[-1] == "RUN...":
        line[-1:] = sorted(str(cell) for cell in (place / "sweeps-out/demo/cells").iterdir())
    if "--search" in line:
        line = ["sweeps/search.yaml" if word == STANDS_FOR["FILE"] else word for word in line]
    if line[:3] == ["rcpo", "train", "-m"]:
        line += SMALL
    elif line[:2] == ["rcpo", "train"] and not {"--help", "--cfg"} & set(line):
        is_first = not (place / FIRST_RUN).exists()
        line += [*SMALL, f"run_dir={FIRST_RUN if is_first else f'runs/{number}'}"]
    if line[:2] in (["rcpo", "score"], ["rcpo", "data"]):
        line += [word for word in SMALL if word.startswith("data.")]
    return ["train.steps=4" if word == "train.steps=300" else word for word in line]


def run(line: list[str], place: Path) -> CompletedProcess[str]:
    """Run `line` in the folder `place`, in a child of the fork server."""
    env = _environment(place)
    if line[0] == "rcpo":
        return forked.rcpo(*line[1:], cwd=place, env=env, seconds=SECONDS)
    assert line[0] == "python"
    return forked.script(SCRIPT, *line[1:], cwd=place, env=env, seconds=SECONDS)


def run_python(block: str, place: Path) -> CompletedProcess[str]:
    """Run the Python of a README in `place`, with few steps where it trains."""
    small = ", ".join(f'"{word}"' for word in SMALL if not word.startswith("data.train"))
    block = block.replace("rcpo.train(", f"rcpo.train({small}, ").replace("train.steps=300", "train.steps=4")
    return forked.script(LIBRARY + block, cwd=place, env=_environment(place), seconds=SECONDS)


def _environment(place: Path) -> dict[str, str]:
    env = os.environ | {"RCPO_CACHE": str(place.with_name("cache")), "HF_HUB_OFFLINE": "1"}
    return {key: value for key, value in env.items() if not key.startswith("WANDB")}
