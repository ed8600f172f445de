"""`rcpo score`: CHES by hand and against a plain forward pass, what pairs have in common, the files."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import markupsafe
import pytest
import torch
from transformers import PreTrainedModel

from helpers.inputs import row
from helpers.tiny_models import make_llama, make_pairs
from rcpo.cli import main
from rcpo.common.errors import NonFiniteError
from rcpo.data.score_file import HELD_OUT, SCHEMA, TRAIN, read_pair_scores
from rcpo.data.tokenize import TokenizedPair, TokenizedSide
from rcpo.models.policy import Policy
from rcpo.quality.ches import ches, ches_norm, score_pairs
from rcpo.quality.pairs import describe_pairs, edit_distance

EVIL = "<script>document.title='run'</script>"


def test_ches_of_known_sums() -> None:
    """h_w = (1, 2), h_l = (3, -1): 1 - 5 = -4; with |y_w| = 2, |y_l| = 1: 1/2 - 5/4 = -3/4."""
    h_w, h_l = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    assert ches(h_w, h_l).tolist() == [-4.0]
    assert ches_norm(h_w, h_l, torch.tensor([2.0]), torch.tensor([1.0])).tolist() == [-0.75]


def plain_scores(model: PreTrainedModel, pair: TokenizedPair) -> list[float]:
    """Of one pair, each side in a forward pass of its own, by transformers' own hidden states and logits."""
    sums, z = [], []
    for side in (pair.chosen, pair.rejected):
        ids = torch.tensor([side.input_ids])
        with torch.no_grad():
            out = model(ids, output_hidden_states=True)
        places = slice(side.num_prompt - 1, len(side.input_ids) - 1)
        sums.append(out.hidden_states[-1][0, places].double().sum(0))
        logps = out.logits[0, places].double().log_softmax(-1)
        z.append(float(logps.gather(1, ids[0, side.num_prompt :, None]).sum()))
    h_w, h_l = sums
    len_w, len_l = (len(side.input_ids) - side.num_prompt for side in (pair.chosen, pair.rejected))
    by_token = h_w @ h_l / (len_w * len_l) - h_w @ h_w / len_w**2
    return [float(h_w @ h_l - h_w @ h_w), float(by_token), *z]


def test_scores_are_those_of_each_pair_alone_however_it_is_batched(tiny_model: PreTrainedModel) -> None:
    """Nine ragged pairs, one, four and nine at a time, padded with two different tokens."""
    pairs = make_pairs(9)
    expected = torch.tensor([plain_scores(tiny_model, pair) for pair in pairs])
    for size, pad_id in ((1, 0), (4, 0), (9, 5)):
        done: list[int] = []
        scored = score_pairs(Policy(tiny_model), pairs, pad_id, size, done.append)
        torch.testing.assert_close(torch.tensor(scored), expected, rtol=1e-5, atol=1e-4)
        assert sum(done) == 9


def test_a_score_that_is_not_finite_stops_with_its_row() -> None:
    model = make_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    pairs = [TokenizedPair(TokenizedSide([1, 4, num], 1), TokenizedSide([1, 5, 6], 1), num) for num in (3, 7)]
    pairs[1] = TokenizedPair(TokenizedSide([1, 7, 8], 1), pairs[1].rejected, 7)
    with pytest.raises(NonFiniteError, match=r"^data row 7: its scores are not finite \(nan, nan\)"):
        score_pairs(Policy(model), pairs, 0, 2)


def slow_distance(left: Sequence[int], right: Sequence[int]) -> int:
    """Levenshtein's table, row by row."""
    before = list(range(len(right) + 1))
    for idx, token in enumerate(left, 1):
        now = [idx]
        for place, other in enumerate(right, 1):
            now.append(min(before[place] + 1, now[-1] + 1, before[place - 1] + (token != other)))
        before = now
    return before[-1]


def test_edit_distance_is_that_of_the_whole_table() -> None:
    """Kitten and sitting are 3 apart; 300 random pairs of up to 90 tokens, longer than a machine word."""
    assert edit_distance(list(map(ord, "kitten")), list(map(ord, "sitting"))) == 3
    draw = random.Random(0)
    for _ in range(300):
        left, right = ([draw.randrange(4) for _ in range(draw.randrange(90))] for _ in range(2))
        assert edit_distance(left, right) == slow_distance(left, right)


def test_repeats_and_contradictions_name_the_first_row() -> None:
    """Rows 0 and 3 are the same, 2 prefers what they reject, 5 has the same responses to another prompt."""

    def pair(row: int, prompt: list[int], y_w: list[int], y_l: list[int]) -> TokenizedPair:
        sides = [TokenizedSide([*prompt, *response], len(prompt)) for response in (y_w, y_l)]
        return TokenizedPair(sides[0], sides[1], row)

    a, b = [3, 4, 5, 6], [3, 4, 6]
    facts = describe_pairs(
        [pair(0, [1], a, b), pair(2, [1], b, a), pair(3, [1], a, b), pair(5, [1, 9], a, b)]
    )
    assert [fact.repeats for fact in facts] == [None, None, 0, None]
    assert [fact.contradicts for fact in facts] == [2, 0, 2, None]
    first = facts[0]
    assert (first.len_w, first.len_l, first.length_difference) == (4, 3, 1)
    assert (first.shared_prefix, first.edit_distance) == (2, 1)
    assert first.digest == facts[2].digest != facts[1].digest


def write_pairs(path: Path) -> None:
    """Row 1 repeats 0, 2 contradicts both, 3 has identical sides, 4 text that a page must not run."""
    rows = [row("alice", "seven", "eight"), row("alice", "seven", "eight"), row("alice", "eight", "seven")]
    rows += [row("bob", "six", "six"), row(EVIL, "seven", "nine"), row("carol", "two", "Paris")]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    (path.parent / "held-out.jsonl").write_text(json.dumps(row("david", "six", "two")) + "\n")


def run_words(*words: str) -> int:
    """The exit code of `rcpo score` in this process."""
    with pytest.raises(SystemExit) as stopped:
        main(["score", *words])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


WORDS = ("data=file", "data.path=pairs.jsonl", "data.eval_path=held-out.jsonl", "train.device=cpu")


def test_the_command_writes_scores_and_a_page_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    assert run_words(*WORDS, "data.on_bad_row=error", "--out", "deep/s.parquet") == 0
    said = capsys.readouterr().out
    assert "1 pair repeats an earlier pair: rows 1 repeats 0\n" in said
    assert "rows 0 against 2, 1 against 2, 2 against 0\n" in said
    assert "1 row left out because the sides are identical: rows 3\n" in said
    assert said.isascii()
    scores = read_pair_scores("deep/s.parquet", "x")
    assert scores.table.schema.names == SCHEMA.names
    train = scores.of_split(TRAIN)
    assert train["row"] == [0, 1, 2, 4, 5]
    assert train["ches"][0] == pytest.approx(train["ches"][1], rel=1e-4)
    assert train["margin"][0] == pytest.approx(-train["margin"][2], rel=1e-4)
    assert scores.of_split(HELD_OUT)["row"] == [0]
    assert scores.made_with["model.path"] == "builtin:tiny"
    page = (tmp_path / "deep/s.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert str(markupsafe.escape(EVIL)) in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["s.html", "s.parquet"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "there.parquet"), "--out there.parquet: there.html exists; give another name, or type"),
        (("--out", "scores"), "--out scores: must end in .parquet; type --out scores.parquet"),
        (("--out", "there.html/s.parquet"), "--out there.html/s.parquet: "),
        (("--out",), "argument --out: expected one argument; `rcpo score --help` lists words and flags"),
        (("--fast",), "unrecognized arguments: --fast"),
        (
            ("data.eval_pair=4",),
            "data.eval_pair: data=arithmetic has no such key; did you mean data.eval_pairs?",
        ),
        (("model.path=nowhere/at/all",), "model.path=nowhere/at/all: no such folder"),
    ],
)
def test_bad_words_are_one_line_and_leave_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    assert run_words(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rcpo: {said}")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]
    assert (tmp_path / "there.html").read_text() == "mine"


def test_old_scores_are_replaced_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "s.parquet").write_text("old")
    assert run_words(*WORDS, "--out=s.parquet", "--overwrite", "data.train_pairs=2") == 0
    assert len(read_pair_scores("s.parquet", "x").of_split(TRAIN)["row"]) == 2


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_words("--help") == 0
    assert "CHES" in capsys.readouterr().out
