"""tasks=yes_no: scores by hand, questions as POPE has them, what is refused, and both scorings of a model."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import PIL.Image
import pytest
import torch

from helpers.forked import rcpo as run_cli
from helpers.tiny_vision import png
from helpers.yes_no import as_pairs, make_answerer, make_questions, write_lines
from rcpo.commands import evaluate
from rcpo.commands.parser import command_parser
from rcpo.common.errors import UserError
from rcpo.config.evaluation import EvaluationConfig
from rcpo.config.validate import section_of
from rcpo.data.batch import collate
from rcpo.data.tokenize import tokenize_records
from rcpo.evaluation.results import Score
from rcpo.evaluation.subject import Loaded, find_subject
from rcpo.evaluation.yes_no import Questions, first_tokens, first_word, scores
from rcpo.models.policy import Policy
from rcpo.records.arithmetic import assistant_turn
from rcpo.records.record import PreferenceRecord

TINY, SEES = "builtin:tiny", "builtin:tiny_vision"


def run(*words: str) -> int:
    return evaluate.run(command_parser("evaluate").parse_args(list(words)))


def row(label: str, log_odds: float, said: str) -> dict[str, Any]:
    value = float((log_odds > 0) == (label == "yes"))
    return {"label": label, "log_odds": log_odds, "said": said, "value": value}


def test_scores_by_hand() -> None:
    """By log-probability yes is said to the first three of five, two of which are yes, as is the fourth: 2
    hits, 1 false alarm, 1 miss, 1 right no. Precision 2/3, recall 2/3, F1 4/6, accuracy 3/5, yes-rate 3/5.
    Written answers: yes, unreadable, no, no, no: yes is said once and right; accuracy 3/5, recall 1/3."""
    rows = [
        row("yes", 1.0, "yes"), row("yes", 2.0, "unreadable"), row("no", 0.5, "no"), row("yes", -1.0, "no"),
        row("no", -3.0, "no"),
    ]  # fmt: skip
    found = scores(rows)
    assert next(iter(found)) == "accuracy"
    of_two_thirds = Score(pytest.approx(2 / 3), pytest.approx(math.sqrt((2 / 3) / 2 / 3)))  # type: ignore[arg-type]
    assert found["precision"] == found["recall"] == of_two_thirds
    assert found["f1"] == Score(pytest.approx(2 / 3), None)  # type: ignore[arg-type]
    of_three_fifths = Score(0.6, pytest.approx(math.sqrt(1.2 / 4 / 5)))  # type: ignore[arg-type]
    assert found["accuracy"] == found["yes_rate"] == found["generated_accuracy"] == of_three_fifths
    assert found["generated_precision"] == Score(1.0, None)
    assert found["generated_recall"].value == pytest.approx(1 / 3)
    assert found["generated_f1"].value == pytest.approx(2 / 4)
    assert found["generated_yes_rate"].value == found["unreadable"].value == pytest.approx(0.2)


def test_where_yes_is_never_said_there_is_no_precision() -> None:
    found = scores([row("yes", -1.0, "no"), row("no", -1.0, "no")])
    assert "precision" not in found
    assert (found["recall"].value, found["f1"].value, found["yes_rate"].value) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes, there is.", "yes"), ("  no .", "no"), ("**No**", "no"), ("YES", "yes"), ("", "unreadable"),
        ("Nothing is there", "unreadable"), ("There is no dog", "unreadable"), ("...", "unreadable"),
    ],
)  # fmt: skip
def test_the_first_word_of_an_answer_counts(answer: str, said: str) -> None:
    assert first_word(answer) == said


def config_of(**settings: Any) -> EvaluationConfig:
    return section_of(EvaluationConfig, {"name": "yes_no", "tasks": ["yes_no"], **settings})


def test_questions_are_those_of_popes_file_and_of_a_data_set_with_other_names(tmp_path: Path) -> None:
    """Paths are relative to the file; a `datasets` folder has the pictures in it. The digest is of texts,
    labels and pictures, wherever they lie."""
    rows = make_questions(tmp_path, 4)
    write_lines(tmp_path / "pope.jsonl", rows)
    pope = Questions(config_of(questions=str(tmp_path / "pope.jsonl")))
    assert [each.text for each in pope.questions] == [row["text"] for row in rows]
    assert [each.is_yes for each in pope.questions] == [True, False, True, False]
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    columns = {
        "question": [row["text"] for row in rows],
        "answer": [row["label"].title() for row in rows],
        "image": [{"bytes": (tmp_path / row["image"]).read_bytes(), "path": None} for row in rows],
    }
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns, features=features)}).save_to_disk(
        tmp_path / "saved"
    )
    saved = Questions(config_of(questions=str(tmp_path / "saved")))
    assert saved.digest == pope.digest
    first = Questions(config_of(questions=str(tmp_path / "saved"), limit=1, questions_split="test"))
    assert [each.text for each in first.questions] == [rows[0]["text"]]
    PIL.Image.new("RGB", (24, 24)).save(tmp_path / rows[1]["image"])
    assert Questions(config_of(questions=str(tmp_path / "pope.jsonl"))).digest != pope.digest


POPE_CARD = """---
configs:
- config_name: Full
  data_files:
  - {split: adversarial, path: Full/adversarial-*}
  - {split: popular, path: Full/popular-*}
  - {split: random, path: Full/random-*}
- config_name: default
  data_files:
  - {split: test, path: data/test-*}
---
"""
CATEGORIES = ("adversarial", "popular", "random")


def write_as_on_the_hub(folder: Path, rows: list[dict[str, Any]], images: Path) -> Path:
    """Files and columns of lmms-lab/POPE, whose card is the head of its README.md: the same rows twice."""
    names = ("id", "question_id", "question", "answer", "image_source", "image", "category")
    features = datasets.Features(
        {name: datasets.Value("string") for name in names} | {"image": datasets.Image()}
    )

    def write(name: str, some: list[dict[str, Any]]) -> None:
        columns = {
            "id": [str(row["question_id"]) for row in some],
            "question_id": [str(row["question_id"]) for row in some],
            "question": [row["text"] for row in some],
            "answer": [row["label"] for row in some],
            "image_source": [row["image"].removesuffix(".png") for row in some],
            "image": [{"bytes": (images / row["image"]).read_bytes(), "path": row["image"]} for row in some],
            "category": [row["category"] for row in some],
        }
        place = folder / f"{name}-00000-of-00001.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(place)

    write("data/test", rows)
    for category in CATEGORIES:
        write(f"Full/{category}", [row for row in rows if row["category"] == category])
    (folder / "README.md").write_text(POPE_CARD)
    return folder


@pytest.mark.ci("data sets")
def test_popes_files_and_its_data_set_of_the_hub_are_read_as_they_are(tmp_path: Path) -> None:
    """The data set's default config, its config of three splits, and the three files of POPE's repository
    (coco_pope_random.json, of a JSON object a line) with the images in a folder of their own."""
    images, files = tmp_path / "val2014", tmp_path / "output"
    for folder in (images, files):
        folder.mkdir()
    rows = make_questions(images, 12)
    rows = [row | {"category": CATEGORIES[place // 4]} for place, row in enumerate(rows)]
    hub = write_as_on_the_hub(tmp_path / "POPE", rows, images)
    found = Questions(config_of(questions=str(hub)))
    assert [each.text for each in found.questions] == [row["text"] for row in rows]
    assert [each.category for each in found.questions] == [row["category"] for row in rows]
    own = {"questions_config": "Full", "questions_split": "adversarial+popular+random"}
    assert Questions(config_of(questions=str(hub), **own)).digest == found.digest
    one = Questions(config_of(questions=str(hub), questions_config="Full", questions_split="popular"))
    assert [each.text for each in one.questions] == [row["text"] for row in rows[4:8]]
    for category in CATEGORIES:
        kept = ("question_id", "image", "text", "label")
        some = [{key: row[key] for key in kept} for row in rows if row["category"] == category]
        write_lines(files / f"coco_pope_{category}.json", some)
    settings = {"questions": f"{files}/coco_pope_*.json", "questions_images": str(images)}
    pope = Questions(config_of(**settings))
    assert [each.category for each in pope.questions] == [f"coco_pope_{row['category']}" for row in rows]
    assert [each.prompt.images[0].digest() for each in pope.questions] == [
        each.prompt.images[0].digest() for each in found.questions
    ]
    with pytest.raises(
        UserError, match=r"row 0 \(.*of .*coco_pope_adversarial.json\): an image file is missing"
    ):
        Questions(config_of(questions=settings["questions"]))
    with pytest.raises(UserError, match=r"questions_images=.*: the images are in the rows, or there are"):
        Questions(config_of(questions=str(hub), questions_images=str(images)))
    with pytest.raises(UserError, match="questions_images=gone: is no folder; give that of the images"):
        Questions(config_of(questions=settings["questions"], questions_images="gone"))


def test_categories_have_scores_of_their_own() -> None:
    """Of popular one of two is right, of random both; one category alone has no more than the whole."""
    rows = [
        row("yes", 1.0, "yes") | {"category": "popular"}, row("no", 1.0, "no") | {"category": "popular"},
        row("yes", 1.0, "yes") | {"category": "random"}, row("no", -1.0, "no") | {"category": "random"},
    ]  # fmt: skip
    found = scores(rows)
    assert next(iter(found)) == "accuracy"
    assert found["accuracy"].value == 0.75
    of_popular = {name: found[f"popular/{name}"].value for name in ("accuracy", "precision", "recall", "f1")}
    assert of_popular == {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    assert found["popular/generated_accuracy"].value == found["random/f1"].value == 1.0
    assert found["random/yes_rate"].value == 0.5
    assert not [name for name in scores(rows[:2]) if "/" in name]


GOOD = {"image": "a.png", "text": "is there a red square ?", "label": "yes"}


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([GOOD, GOOD | {"label": "maybe"}], [SEES], r"row 1 .*: its label is 'maybe', which is neither yes"),
        ([GOOD | {"label": 1}], [SEES], "its label is 1, which is neither yes nor no; mend it or leave"),
        ([GOOD | {"text": " "}], [SEES], "row 0 .*: its text is no text"),
        ([GOOD | {"image": "none.png"}], [SEES], "row 0 .*: an image file is missing: .*none.png"),
        ([{"image": "a.png", "text": "x"}], [SEES], "has neither a column label nor answer, but image, text"),
        ([GOOD], [TINY], "the questions have images, and tiny reads text alone; give a vision"),
        ([GOOD], [SEES], "writes yes and no as the same token, or has no word for them"),
        ([GOOD], [SEES, "tasks=arithmetic,yes_no"], "tasks=arithmetic: asks text alone, and tiny"),
        ([GOOD], [TINY, "tasks=arithmetic"], "questions=.*: no task asks questions of yours; type"),
        ([], [TINY], "questions=.*: is empty; give a file"),
    ],
)  # fmt: skip
def test_questions_that_cannot_be_asked_are_one_line(
    rows: list[dict[str, Any]], words: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    file = write_lines(tmp_path / "q.jsonl", rows)
    tasks = [] if any(word.startswith("tasks=") for word in words) else ["tasks=yes_no"]
    with pytest.raises(UserError, match=said):
        run(*words, *tasks, f"questions={file}")


def test_no_questions_and_no_such_file_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tasks=yes_no: has no questions of its own; type questions=FILE"):
        run(TINY, "tasks=yes_no")
    with pytest.raises(UserError, match=r"questions=.*none.jsonl: "):
        run(TINY, "tasks=yes_no", f"questions={tmp_path}/none.jsonl")


@pytest.mark.ci("the model that sees")
def test_a_model_is_scored_by_the_z_of_training_and_by_what_it_writes(tmp_path: Path) -> None:
    """The log-odds are z of the responses yes and no by training's own pass, in batches of other sizes;
    accuracy is what they say. What is known is not asked again, but for other questions."""
    model = make_answerer(tmp_path / "model")
    rows = make_questions(tmp_path, 12)
    file = write_lines(tmp_path / "q.jsonl", rows)
    questions = Questions(config_of(questions=str(file)))
    loaded = Loaded(find_subject(str(model)), may_see=True)
    assert first_tokens(loaded.tokenizer, {}) == ([35], [36])
    found, kept = questions.ask(loaded, 5)
    records = [
        PreferenceRecord(each.prompt.opening, assistant_turn("yes"), assistant_turn("no"), place,
                         images=each.prompt.images)
        for place, each in enumerate(questions.questions)
    ]  # fmt: skip
    pairs = tokenize_records(records, loaded.tokenizer, 256, None, "error", {}, False).pairs
    with torch.no_grad():
        z_w, z_l = Policy(loaded.model)(collate(list(pairs), 0)).chunk(2)
    log_odds = torch.tensor([row["log_odds"] for row in kept])
    assert torch.allclose(log_odds, z_w - z_l, atol=1e-5)
    assert log_odds.abs().min() > 0
    right = [(each > 0) == (row["label"] == "yes") for each, row in zip(log_odds, rows, strict=True)]
    assert found["accuracy"].value == sum(right) / 12
    assert found["unreadable"].value > 0.9  # its answers begin with "there" or "it", as it has learnt


@pytest.mark.ci("the model that sees")
def test_scores_are_in_the_runs_folder_and_in_the_table(tmp_path: Path) -> None:
    """A whole training with train.evaluate=yes_no, then the same question file by hand: nothing is new."""
    model = make_answerer(tmp_path / "model")
    write_lines(tmp_path / "pairs.jsonl", as_pairs(make_questions(tmp_path, 40, "train")))
    file = write_lines(tmp_path / "q.jsonl", make_questions(tmp_path, 8))
    words = [f"model.path={model}", "data=file", f"data.path={tmp_path}/pairs.jsonl", "data.eval_pairs=8"]
    words += ["train.steps=2", "train.evaluate=yes_no", f"evaluation.questions={file}", "tracking=none"]
    done = run_cli("train", *words, f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not evaluated" not in done.stderr + done.stdout
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert set(found) == {"final", "step-000000"}
    assert set(found["final"]["yes_no"]["metrics"]) >= {"accuracy", "generated_accuracy", "unreadable"}
    table = pd.read_parquet(tmp_path / "run/evaluation/final/yes_no.parquet")
    assert found["final"]["yes_no"]["metrics"]["accuracy"]["value"] == table["value"].mean()
    assert list(table["label"]) == ["yes", "no"] * 4
    said = run_cli("evaluate", f"{tmp_path}/run", "tasks=yes_no", f"questions={file}", cwd=tmp_path)
    assert "accuracy" in said.stdout
    assert "run final: yes_no" not in said.stdout  # nothing was asked
    compared = run_cli("compare", f"{tmp_path}/run", "--json", cwd=tmp_path)
    cells = json.loads(compared.stdout)["cells"]
    assert cells[0]["downstream/yes_no"] == table["value"].mean()
