"""`rcpo data`: what it says is what trains."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import rcpo.builtin
from helpers import forked
from helpers.inputs import row
from rcpo.commands.data import _resolved, config_words
from rcpo.config.compose import compose
from rcpo.training.read_inputs import read_inputs

NAMES = ("alice", "bob", "carol", "dave", "emma", "frank")
WORDS = ("train.pairs_per_step=4", "data.eval_pairs=3", "train.max_length=18")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """24 pairs; row 5 has no answer, row 7 a long one."""
    answers = ("one", "two", "three", "four")
    rows = [row(NAMES[number % 6], answers[number // 6], "nine") for number in range(24)]
    rows[5]["chosen"][-1]["content"] = ""
    rows[7]["chosen"][-1]["content"] = "three " * 20
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def shown(*words: str | Path, code: int = 0) -> dict[str, Any]:
    done = forked.rcpo("data", *map(str, words), "--json", cwd=Path("/"))
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_it_says_is_what_trains(pairs: Path) -> None:
    """Account, order, tokens, lengths and cuts are those of `read_inputs` with the same words."""
    said = shown(pairs, *WORDS, "--pairs", "100")
    tree = compose(config_words([str(pairs), *WORDS]))
    assert tree is not None
    inputs = read_inputs(_resolved(tree))
    assert said["refused"] is None
    assert said["rows"] == json.loads(json.dumps(inputs.account.as_json()))
    assert [pair["row"] for pair in said["pairs"]] == [pair.row for pair in inputs.train]
    for one, pair in zip(said["pairs"], inputs.train, strict=True):
        for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            assert one["prompt"]["tokens"] == side.num_prompt
            assert one[name]["tokens"] == side.num_tokens - side.num_prompt
    for part, lengths in said["lengths"].items():
        assert sum(lengths["histogram"]["pairs"]) == len(inputs.train)
        assert lengths["longest"] == max(pair[part]["tokens"] for pair in said["pairs"])
        assert lengths["cut"] == sum(pair[part]["cut"] > 0 for pair in said["pairs"])


def test_pairs_by_row_with_cuts_and_the_end_that_is_scored(pairs: Path) -> None:
    """Row 7: of 41 tokens 9 are the prompt's share and 9 the answer's; row 5 says why it is not there."""
    said = shown(pairs, *WORDS, "--pairs", "0", "--row", "7", "--row", "0")
    first, second = said["pairs"]
    assert (first["row"], second["row"]) == (7, 0)
    assert {first["use"], second["use"]} <= {"trained", "held out"}
    assert (first["prompt"]["tokens"], first["chosen"]["tokens"]) == (9, 9)
    assert first["chosen"] == {"text": " ".join(["three"] * 9), "tokens": 9, "cut": 12}
    assert first["prompt"]["cut"] == 6
    assert second["chosen"] == {"text": "one⟦</s>⟧", "tokens": 2, "cut": 0}
    said = shown(pairs, *WORDS, "--row", "5", code=2)
    assert said["refused"] == "--row 5: is dropped because chosen is empty; give a row that is used"
    assert "has this number" in shown(pairs, *WORDS, "--row", "24", code=2)["refused"]


def test_the_text_is_plain_without_a_terminal_and_coloured_when_asked(pairs: Path) -> None:
    words = ("data", str(pairs), *WORDS, "--pairs", "0", "--row", "7")
    plain = forked.rcpo(*words, cwd=pairs.parent)
    assert plain.returncode == 0
    assert plain.stdout.startswith(
        f"{pairs}: 24 rows read\n  1 dropped because chosen is empty (row 5)\n"
        "  3 held out, 20 to train on\n\n"
    )
    assert "chosen (9 tokens, scored, 12 more cut off)\n  «three three" in plain.stdout
    assert " ✂\n" in plain.stdout
    cut = r"prompt: \d+ tokens on average, \d+ at most; 1 of the pairs cut from the left"
    assert re.search(cut, plain.stdout)
    assert "\x1b" not in plain.stdout
    coloured = forked.rcpo(*words, "--color", cwd=pairs.parent)
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured.stdout) == plain.stdout
    assert "\x1b[1;32m«" in coloured.stdout


def test_it_needs_no_weights_and_no_gpu(pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(Path(rcpo.builtin.__file__).parent / "tiny", folder)
    (folder / "model.safetensors").unlink()
    words = (pairs, f"model.path={folder}", "launch.gpus_per_node=8", "train.pairs_per_step=8")
    assert shown(*words, "data.eval_pairs=3")["refused"] is None
    done = forked.rcpo("train", "data=file", f"data.path={pairs}", f"model.path={folder}", cwd=tmp_path)
    assert done.returncode == 2
    assert "has no *.safetensors weights" in done.stderr


def test_the_code_is_2_where_nothing_would_train(pairs: Path) -> None:
    """All is shown where a run would be refused later; where no pair is left, the reason alone."""
    said = shown(pairs, "data.eval_pairs=3", "train.pairs_per_step=64", code=2)
    assert said["refused"].startswith("train.pairs_per_step=64: there are only 20 training pairs")
    assert len(said["pairs"]) == 3
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    pairs.write_text("".join(json.dumps(each | {"rejected": each["chosen"]}) + "\n" for each in rows))
    said = shown(pairs, "data.on_bad_row=drop", code=2)
    assert "none of its 24 rows can train" in said["refused"]
    assert said == {"refused": said["refused"], "rows": None, "notes": [], "lengths": {}, "pairs": []}


def test_paths_are_the_words_of_train() -> None:
    assert config_words(["a b.jsonl", "seed=1"]) == ["data=file", 'data.path="a b.jsonl"', "seed=1"]
    assert config_words(["a.jsonl", "b.csv"]) == ["data=file", 'data.path=["a.jsonl", "b.csv"]']
    assert config_words(["data=hh_rlhf", "x"]) == ['data.path="x"', "data=hh_rlhf"]
    assert config_words(["seed=1"]) == ["seed=1"]


def test_data_cannot_steer_the_terminal(tmp_path: Path) -> None:
    """Escape codes in a response come out as Python writes them."""
    path = tmp_path / "odd.jsonl"
    rows = [{"prompt": f"q{n}", "chosen": f" \x1b[2J{n}", "rejected": " no"} for n in range(8)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    done = forked.rcpo("data", str(path), "data.eval_pairs=2", "train.pairs_per_step=2", cwd=tmp_path)
    assert "\x1b" not in done.stdout


@pytest.mark.ci("two more starts")
def test_a_side_that_is_not_there_is_not_shown(tmp_path: Path) -> None:
    """Of conversations neither a histogram nor a part of rejected responses; of single answers the part that
    the label says."""
    talks = [{"messages": row(name, answer, "")["chosen"]} for name in NAMES for answer in ("one", "two")]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in talks))
    words = (path, "objective=sft", "data.eval_pairs=2", "train.pairs_per_step=2", "--pairs", "2")
    said = shown(*words)
    assert set(said["lengths"]) == {"prompt", "chosen"}
    assert [set(pair) for pair in said["pairs"]] == [{"row", "use", "prompt", "chosen"}] * 2
    done = forked.rcpo("data", *map(str, words), cwd=tmp_path)
    assert "rejected" not in done.stdout
    answers = [
        {"prompt": f"w{number % 7}", "completion": f" w{number}", "label": number % 2 == 0}
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in answers))
    said = shown(path, "objective=kto", "data.eval_pairs=8", "train.pairs_per_step=2", "--pairs", "20")
    assert set(said["lengths"]) == {"prompt", "chosen", "rejected"}
    for pair in said["pairs"]:
        assert ("chosen" in pair, "rejected" in pair) == (pair["row"] % 2 == 0, pair["row"] % 2 == 1)
