"""`rcpo judge`: against a judge of this machine that prefers longer or first answers; win rates by hand; a
local reward model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.loopback_judge import Rule, judging_by, longer
from helpers.reward_models import make_classifier
from rcpo import cli
from rcpo.common.errors import UserError
from rcpo.evaluation import chat as chat_module
from rcpo.evaluation.answer_files import Duel, join_answers
from rcpo.evaluation.classifier_judge import ClassifierJudge
from rcpo.evaluation.forms import Answered, Turn, written
from rcpo.evaluation.judge import messages_of, verdict_of
from rcpo.evaluation.prompts import Prompt
from rcpo.evaluation.win_rate import equal_length_rates, order_of, rates, wins_of


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "RETRIES", 0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def write_answers(folder: Path) -> list[str]:
    """40 prompts; A's answer is the longer one to 30 of them, and B's to 10, by 1 to 10 letters."""
    for name in ("a", "b"):
        rows = []
        for number in range(40):
            is_longer = (number % 4 > 0) == (name == "a")
            rows.append(
                {
                    "index": number,
                    "prompt": f"question {number}",
                    "response": "x" * (50 + is_longer * (number // 4 + 1)),
                }
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl")]


def judge(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["judge", *words])
    assert stop.value.code == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["judge", *words])
    assert stop.value.code == 2
    return capsys.readouterr().err


def judged(tmp_path: Path, rule: Rule) -> dict[str, Any]:
    files = write_answers(tmp_path)
    with judging_by(rule) as (url, _):
        judge(*files, f"url={url}", "judge=loopback", f"out={tmp_path / 'out.json'}", "--yes")
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return found


def test_a_judge_that_prefers_longer_answers_is_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wins the 30 of 40 where it is longer. At equal length it may well be no better."""
    found = judged(tmp_path, longer)
    controlled = found["win_rate_at_equal_length"]
    assert found["win_rate"]["value"] == 0.75
    assert 0.5 < found["win_rate"]["low"] < 0.75 < found["win_rate"]["high"]
    assert controlled["low"] < 0.5 < controlled["value"] < 0.7
    assert found["order"]["consistent"] == 1.0
    assert "at equal length     0." in capsys.readouterr().out


def test_a_judge_that_prefers_the_first_answer_is_found_out(tmp_path: Path) -> None:
    found = judged(tmp_path, lambda first, second: "[[1]]")
    assert found["win_rate"]["value"] == 0.5
    assert (found["order"]["first"], found["order"]["second"], found["order"]["consistent"]) == (
        1.0,
        0.0,
        0.0,
    )
    assert {(row["a_first"], row["b_first"]) for row in found["rows"]} == {("1", "1")}


def test_nothing_is_sent_before_its_cost_is_agreed_and_no_reply_is_asked_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_answers(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with judging_by(longer) as (url, seen):
        words = [*files, f"url={url}", "judge=loopback", "price=1000000,0"]
        said = refused(capsys, *words)
        assert seen == []
        letters = sum(
            len(turn["content"])
            for duel in join_answers(*map(Path, files)).duels
            for swapped in (False, True)
            for turn in messages_of(duel, swapped)
        )
        assert f"80 requests to {url} (0 replies are kept): about {letters // 4} tokens" in said
        assert f"at most {letters // 4}.00 by price=; nothing was sent: type --yes" in said
        judge(*words, "--yes")
        assert len(seen) == 80
        assert {key for key, _ in seen} == {"Bearer a-key"}
        judge(*words)
        assert len(seen) == 80
        assert "0 requests" in capsys.readouterr().out.split("win rate")[1]


def test_a_reply_that_cannot_be_read_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the first answer has 60 letters, as one of the last four pairs has, the judge talks nonsense."""
    found = judged(tmp_path, lambda first, second: "well" if len(first) == 60 else longer(first, second))
    assert found["order"]["unreadable"] == 4
    assert found["prompts_without_verdict"] == 0
    assert "4 of 80 replies cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rule", "status", "said"),
    [
        (
            lambda *_: "it depends",
            200,
            "judge=loopback: none of its 80 replies can be read, the first is 'it dep",
        ),
        (longer, 401, "refuses the key (Error code: 401"),
        (longer, 404, "knows no judge=loopback (Error code: 404"),
        (longer, 500, "failed (Error code: 500"),
        (longer, 400, "none of its 80 replies can be read, the first is 'refused: Error code: 400"),
    ],
)
def test_a_judge_that_cannot_be_used_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: Rule, status: int, said: str
) -> None:
    files = write_answers(tmp_path)
    with judging_by(rule, status) as (url, _):
        line = refused(capsys, *files, f"url={url}", "judge=loopback", "--yes")
    assert said in line
    assert line.count("\n") == 1


def test_a_judge_that_is_slow_or_not_there_is_one_line_and_what_it_said_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_answers(tmp_path)
    with judging_by(longer, seconds=1.3) as (url, _):
        line = refused(capsys, *files, f"url={url}", "judge=loopback", "timeout=1", "at_once=2", "--yes")
        assert f"url={url}: no reply in 1 s; replies so far are kept: type timeout=5" in line
    assert "cannot be reached" in refused(capsys, *files, f"url={url}", "judge=loopback", "--yes")


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[1]]", "1"),
        ("Not [[1]] but [[ TIE ]]", "tie"),
        ("2.", "2"),
        ("1 or 2", None),
        ("", None),
        ("[[3]]", None),
    ],
)
def test_replies_are_read(reply: str, verdict: str | None) -> None:
    assert verdict_of(reply) == verdict


def test_wins_and_order_by_hand() -> None:
    """A wins in both orders; only when first; a tie and a loss; one reply; none."""
    verdicts = [("1", "2"), ("1", "1"), ("tie", "1"), (None, "2"), (None, None)]
    assert wins_of(verdicts) == pytest.approx([1.0, 0.5, 0.25, 1.0, np.nan], nan_ok=True)
    order = order_of(verdicts)
    assert (order.first, order.second, order.tie) == (4 / 7, 2 / 7, 1 / 7)
    assert (order.consistent, order.unreadable) == (1 / 3, 3)


def test_the_rate_at_equal_length_is_that_of_a_logistic_regression() -> None:
    """Wins that are sigmoid(0.7 + 2 d) give back sigmoid(0.7); without differences it is the mean."""
    difference = np.linspace(-1, 1, 4001)
    wins = 1 / (1 + np.exp(-(0.7 + 2 * difference)))
    assert equal_length_rates(wins[None], difference[None])[0] == pytest.approx(
        1 / (1 + np.exp(-0.7)), abs=1e-4
    )
    plain, controlled = rates(np.array([1.0, 1.0, 0.0, np.nan]), np.array([3.0, 3.0, 3.0, 9.0]))
    assert plain.value == pytest.approx(2 / 3)
    assert controlled.value == pytest.approx(2 / 3, abs=1e-3)


def test_of_many_prompts_length_alone_is_no_better_at_equal_length() -> None:
    """805 prompts, A longer by 5 ± 8 letters, and the longer one wins always."""
    longer = np.random.default_rng(0).normal(5, 8, 805).round()
    plain, controlled = rates(np.where(longer == 0, 0.5, longer > 0), longer)
    assert plain.low > 0.65
    assert controlled.low < 0.5 < controlled.high < 0.52


@pytest.mark.parametrize("form", ["jsonl", "alpaca_eval", "arena_hard"])
def test_the_files_that_generate_writes_are_read(tmp_path: Path, form: str) -> None:
    suffix = "json" if form == "alpaca_eval" else "jsonl"
    for name in ("a", "b"):
        prompt = Prompt("how many ?", row={"instruction": "how many ?", "uid": "u"})
        answered = Answered(prompt, "how many ?", [[Turn(f"{name} has\u2028seven", 3, True)]])
        (tmp_path / f"{name}.{suffix}").write_text(written(form, [answered], name))
    joined = join_answers(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
    assert joined.duels == [
        Duel([{"role": "user", "content": "how many ?"}], "a has\u2028seven", "b has\u2028seven")
    ]
    (tmp_path / "c.jsonl").write_text('{"prompt": "another", "response": "x"}\n')
    with pytest.raises(UserError, match="have no prompt in common"):
        join_answers(tmp_path / f"a.{suffix}", tmp_path / "c.jsonl")


def test_a_reward_model_scores_each_answer_by_itself(tmp_path: Path) -> None:
    make_classifier(tmp_path / "reward", {"seven": 1.0})
    judge = ClassifierJudge(str(tmp_path / "reward"))
    asked = [{"role": "user", "content": "how many ?"}]
    duels = [Duel(asked, "seven", "eight"), Duel(asked, "eight", "seven"), Duel(asked, "one", "two")]
    duels.append(Duel(asked, "seven " * 40, "eight"))
    assert judge.ask(duels, lambda num: None) == [("1", "2"), ("2", "1"), ("tie", "tie"), (None, None)]
    make_classifier(tmp_path / "two", {"seven": 1.0}, num_labels=2)
    with pytest.raises(UserError, match="gives 2 numbers, and a reward is one"):
        ClassifierJudge(str(tmp_path / "two"))


def test_a_reward_model_without_a_score_is_none(tmp_path: Path) -> None:
    """A head that the folder lacks would be drawn at random; nan is no verdict, and not a lost comparison."""
    make_classifier(tmp_path / "reward", {"seven": 1.0})
    file = tmp_path / "reward/model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in weights if name != "score.weight"}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"has no score\.weight, which would be drawn at random"):
        ClassifierJudge(str(tmp_path / "reward"))
    save_file(weights | {"score.weight": weights["score.weight"] * torch.nan}, file, {"format": "pt"})
    duel = Duel([{"role": "user", "content": "how many ?"}], "seven", "eight")
    with pytest.raises(UserError, match="or has a score that is not finite"):
        ClassifierJudge(str(tmp_path / "reward")).ask([duel], lambda num: None)
