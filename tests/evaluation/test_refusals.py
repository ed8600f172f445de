"""`rcpo lab refusal`: which answers refuse, pairs by hand, and the whole experiment on the model that
ships."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.loopback_judge import labelling_by
from helpers.reward_models import make_classifier
from rcpo import cli
from rcpo.evaluation.json_rows import json_rows
from rcpo.evaluation.refusals import Answered, Classifier, Label, Rules, make_pairs
from rcpo.evaluation.refusals_by_chat import refuses_by
from rcpo.records.arithmetic import problem_split

ASKED = [{"role": "user", "content": "question"}]
YES, NO = Label(True), Label(False)


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help.", True),
        ("I\u2019m  SORRY about that", True),
        ("As an AI, I do not", True),
        ("Sure: first, take a", False),
        ("", False),
        (f"{'word ' * 50} I cannot", False),
    ],
)
def test_a_refusal_is_known_by_how_it_begins(answer: str, refuses: bool) -> None:
    assert Rules().label(ASKED, answer) == Label(refuses)


def test_phrases_of_the_users_own() -> None:
    assert Rules(["Not  Today"]).label(ASKED, "not today, friend").refuses
    assert not Rules(["not today"]).label(ASKED, "I cannot").refuses


def sides(row: dict[str, Any]) -> tuple[str, str]:
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_the_refusal_is_chosen_and_ties_are_broken() -> None:
    """By hand: b refuses alone; of two refusals the higher score wins; equal ones are drawn or dropped; the
    same answer twice and an empty one are left out."""
    answered = [
        Answered(ASKED, ("a", "b"), (NO, YES)),
        Answered(ASKED, ("a", "b"), (Label(True, 0.1), Label(True, 0.3))),
        Answered(ASKED, ("a", "b"), (NO, NO)),
        Answered(ASKED, ("a", " a "), (NO, NO)),
        Answered(ASKED, ("", "b"), (NO, YES)),
    ]
    rows, counts = make_pairs(answered, "drop", 0)
    assert [sides(row) for row in rows] == [("b", "a"), ("b", "a")]
    assert counts == {
        "one refuses": 1,
        "both refuse": 1,
        "none refuses": 1,
        "left out: a tie": 1,
        "left out: the same answer twice, or an empty one": 2,
    }
    rows, _ = make_pairs(answered, "draw", 0)
    assert len(rows) == 3
    drawn = {sides(make_pairs(answered, "draw", seed)[0][2]) for seed in range(10)}
    assert drawn == {("a", "b"), ("b", "a")}, "a coin, by seed"
    assert make_pairs(answered, "draw", 3) == make_pairs(answered, "draw", 3)


@pytest.mark.ci("experiments of rcpo lab")
@pytest.mark.timeout(600)
def test_the_experiment_on_the_model_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A "refusal" is an answer of at most five. Pairs, counts and rates are what the kept answers say; what
    is there is not made again."""
    monkeypatch.chdir(tmp_path)
    problems = problem_split(0, 24, 0)[1]
    Path("P.jsonl").write_text("".join(json.dumps({"prompt": each.prompt()}) + "\n" for each in problems))
    few = ["zero", "one", "two", "three", "four", "five"]
    Path("few.txt").write_text("\n".join(few))
    words = [
        "lab", "refusal", "builtin:tiny", "prompts=P.jsonl", "phrases=few.txt", "temperature=1.5",
        "max_new_tokens=12", "calibrations=off", "ches=60", "out=OUT", "parallel=2", "train.steps=2",
        "train.pairs_per_step=2",
    ]  # fmt: skip
    times = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0
        files = [
            *Path("OUT").glob("*.jsonl"),
            *Path("OUT/runs/cells").glob("*/lab/*.jsonl"),
            *Path("OUT").glob("*.parquet"),
        ]
        times.append(
            {
                file: file.stat().st_mtime_ns
                for file in files
                if file.name not in ("pairs.jsonl", "held_out.jsonl")
            }
        )
    assert times[0] == times[1]
    tree = json.loads(Path("OUT/refusal.json").read_text())
    before, *cells = tree["rates"]
    assert [cell["pairs"] for cell in cells] == ["all", "ches60"]

    def refuses(row: dict[str, Any]) -> bool:
        return any(word in row["response"] for word in few)

    for each, file in (
        (before, Path("OUT/initial.jsonl")),
        (cells[0], Path(f"OUT/runs/cells/{cells[0]['cell']}/lab/refusal.jsonl")),
    ):
        rows = json_rows(file, "")
        for part, is_held_out in (("trained", False), ("held_out", True)):
            of_part = [refuses(row) for row in rows if row["held_out"] == is_held_out]
            assert each[part]["rate"] == pytest.approx(sum(of_part) / len(of_part))
    assert (before["trained"]["prompts"], before["held_out"]["prompts"]) == (18, 6)
    pairs = json_rows(Path("OUT/pairs.jsonl"), "")
    assert len(pairs) == tree["pairs"]["pairs"]
    decided = [
        pair
        for pair in pairs
        if refuses({"response": sides(pair)[0]}) != refuses({"response": sides(pair)[1]})
    ]
    assert len(decided) == tree["pairs"]["one refuses"]
    assert all(refuses({"response": sides(pair)[0]}) for pair in decided)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words[:5], "temperature=1", *words[6:]])
    assert stop.value.code == 2


def test_a_judges_replies_are_read() -> None:
    said = {"[[refuses]]": True, "It [[answers]] at first, then [[Refuses]].": True, "Answers.": False,
            "[[answers]]": False, "It refuses": None, "": None}  # fmt: skip
    assert {reply: refuses_by(reply) for reply in said} == said


@pytest.mark.ci("experiments of rcpo lab")
@pytest.mark.timeout(600)
def test_a_judge_of_the_chat_api_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that knows refusals by words: pairs and rates are what it said. Nothing is sent or written before
    --yes, at most what was said is sent, and nothing is asked twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path / "cache"))
    problems = problem_split(0, 12, 0)[1]
    Path("P.jsonl").write_text("".join(json.dumps({"prompt": each.prompt()}) + "\n" for each in problems))
    few = ["zero", "one", "two", "three", "four", "five"]
    words = [
        "lab", "refusal", "builtin:tiny", "prompts=P.jsonl", "temperature=1.5", "max_new_tokens=12",
        "calibrations=off", "train.steps=2", "train.pairs_per_step=2",
    ]  # fmt: skip

    def by_words(answer: str) -> str:
        return "[[refuses]]" if any(word in answer for word in few) else "[[answers]]"

    def ran(*own: str) -> int:
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *own])
        assert isinstance(stop.value.code, int)
        return stop.value.code

    with labelling_by(by_words) as (url, seen):
        judged = [f"url={url}", "judge=words", "out=B"]
        assert ran(*judged) == 2
        assert "at most 48 requests" in capsys.readouterr().err, "12 prompts, 2 drawn and 2 greedy answers"
        assert not seen
        assert not Path("B").exists()
        assert ran(*judged, "--yes") == 0
        num_asked = len(seen)
        assert 0 < num_asked <= 48
        assert ran(*judged, "--yes") == 0
        assert len(seen) == num_asked
    tree = json.loads(Path("B/refusal.json").read_text())
    assert (tree["labeller"], tree["unreadable"]) == ("words", 0)
    labels = [by_words(row["response"]) for row in json_rows(Path("B/initial.jsonl"), "") if row["held_out"]]
    assert tree["rates"][0]["held_out"]["rate"] == labels.count("[[refuses]]") / 3
    for pair in json_rows(Path("B/pairs.jsonl"), ""):
        assert by_words(sides(pair)[0]) >= by_words(sides(pair)[1]), "the refusal is chosen"


@pytest.mark.ci("experiments of rcpo lab")
@pytest.mark.timeout(600)
def test_a_classifier_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose score is 1 for an answer that ends in "seven", .5 in "six", and 0 for all others. Above a
    threshold of .7 "seven" alone refuses, and of two that do not "six" is chosen. An answer longer than its
    context has no score, and does not refuse."""
    monkeypatch.chdir(tmp_path)
    scores = {"seven": 1.0, "six": 0.5}
    make_classifier(tmp_path / "reward", scores, positions=24)
    labeller = Classifier("reward", 0.7)
    said = ["alice has seven", "alice has six", "alice has one", "seven " * 40]
    labels = labeller.labels([(ASKED, answer) for answer in said])
    assert [label.refuses for label in labels] == [True, False, False, False]
    assert [label.score for label in labels[:3]] == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
    assert labels[3].score is None

    problems = problem_split(0, 24, 0)[1]
    Path("P.jsonl").write_text("".join(json.dumps({"prompt": each.prompt()}) + "\n" for each in problems))
    words = [
        "lab", "refusal", "builtin:tiny", "prompts=P.jsonl", "classifier=reward", "ties=drop",
        "temperature=2", "max_new_tokens=3", "calibrations=off", "out=OUT", "train.steps=1",
        "train.pairs_per_step=2",
    ]  # fmt: skip

    def ran(*own: str) -> int:
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, *own])
        assert isinstance(stop.value.code, int)
        return stop.value.code

    assert ran("threshold=0.7") == 0
    tree = json.loads(Path("OUT/refusal.json").read_text())
    assert tree["labeller"] == "reward > 0.7"

    def score(answer: str) -> float:
        return scores.get((answer.split() or [""])[-1], 0.0)

    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in json_rows(Path("OUT/answers.jsonl"), ""):
        by_prompt.setdefault(row["index"], []).append(row)
    drawn = [[row["response"] for row in both] for both in by_prompt.values() if not both[0]["held_out"]]
    decided = [both for both in drawn if all(map(str.strip, both)) and score(both[0]) != score(both[1])]
    pairs = [sides(pair) for pair in json_rows(Path("OUT/pairs.jsonl"), "")]
    assert pairs == [tuple(sorted(both, key=score, reverse=True)) for both in decided]
    assert {score(chosen) for chosen, _ in pairs} == {1.0, 0.5}, "both ways of choosing are there"
    assert tree["pairs"]["one refuses"] == sum(score(chosen) == 1 for chosen, _ in pairs)
    before = tree["rates"][0]
    for part, is_held_out in (("trained", False), ("held_out", True)):
        rows = [row for row in json_rows(Path("OUT/initial.jsonl"), "") if row["held_out"] == is_held_out]
        refuse = [score(row["response"]) > 0.7 for row in rows]
        assert before[part]["rate"] == pytest.approx(sum(refuse) / len(refuse))
    capsys.readouterr()
    assert ran("threshold=0.4") == 2
    assert "out=OUT: was begun with other threshold" in capsys.readouterr().err
