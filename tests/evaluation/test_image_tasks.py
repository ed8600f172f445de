"""lm-eval's tasks that show images, through its own class for models that see, against rcpo's answers."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
import yaml

from helpers.forked import rcpo as run_cli
from helpers.tiny_vision import make_vision, png, rows_with_images
from rcpo.commands import evaluate
from rcpo.commands.parser import command_parser
from rcpo.common.errors import UserError
from rcpo.evaluation.decoding import Decoding, answer_all
from rcpo.evaluation.generation import asked_first
from rcpo.evaluation.harness import Harness
from rcpo.evaluation.prompts import Prompt
from rcpo.evaluation.subject import Loaded, find_subject
from rcpo.records.arithmetic import user_turn
from rcpo.records.images import Image
from rcpo.records.messages import PLACE
from rcpo.records.scenes import draw_scene

pytestmark = pytest.mark.ci("lm-eval", needs="lm_eval")
TINY, SEES = "builtin:tiny", "builtin:tiny_vision"
NUM_NEW = 12


def run(*words: str) -> int:
    return evaluate.run(command_parser("evaluate").parse_args(list(words)))


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A parquet file with an `images` column, as data sets of the hub have it."""
    folder.mkdir(exist_ok=True)
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "question": text,
            "answer": text,
            "choices": datasets.List(text),
        }
    )
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "rows.parquet")
    return folder


def write_task(folder: Path, name: str, **entries: Any) -> Path:
    task = {
        "task": name, "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": str(folder / "rows.parquet")}, "test_split": "train",
        "doc_to_text": "{{question}}", "doc_to_target": "answer",
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | entries))
    return folder


def write_shown(folder: Path, name: str, doc_to_text: str, num_new: int = NUM_NEW, **entries: Any) -> Path:
    """A task whose questions show images; its answers are written."""
    settings = {"until": ["</s>"], "do_sample": False, "max_gen_toks": num_new}
    shown = {
        "doc_to_image": "images", "doc_to_text": doc_to_text, "output_type": "generate_until",
        "generation_kwargs": settings,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    return write_task(folder, name, **(shown | entries))


def shapes(num: int) -> list[dict[str, Any]]:
    """Of data=shapes."""
    draw, rows = random.Random("image tasks"), []
    for _ in range(num):
        scene = draw_scene(draw)
        image = {"bytes": scene.image().data, "path": None}
        choices = [scene.answer(), *scene.near_misses()[:2]]
        rows.append(
            {"images": [image], "question": scene.question(), "answer": scene.answer(), "choices": choices}
        )
    return rows


def own_answers(loaded: Loaded, rows: list[dict[str, Any]], num_new: int = NUM_NEW) -> list[str]:
    """Greedy answers by `rcpo generate`'s code to user turns with the images in front."""
    prompts = [
        Prompt(user_turn(PLACE * len(row["images"]) + row["question"]),
               images=tuple(Image(None, each["bytes"]) for each in row["images"]))
        for row in rows
    ]  # fmt: skip
    asked = asked_first(loaded.asking, prompts, "test", None)
    decoding, answers = Decoding(max_new_tokens=num_new, answers_per_batch=4), {}
    for found in answer_all(loaded.model, asked, decoding, loaded.asking.stop_ids, loaded.asking.pad_id):
        answers |= found
    return [loaded.asking.text(answers[place].ids) for place in range(len(rows))]


def test_scores_are_those_of_rcpos_own_answers(tmp_path: Path) -> None:
    """A run's end and what it started from, through lm-eval's class: word for word what rcpo writes to the
    same prompts; in the run's folder and in the table of compare."""
    words = ["model=tiny_vision", "data=shapes", "data.train_pairs=64", "data.eval_pairs=8", "train.steps=3"]
    words += ["optim.lr=1e-3", "tracking=none", "train.pairs_per_step=8", f"run_dir={tmp_path}/run"]
    done = run_cli("train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = shapes(24)
    tasks = write_shown(write_rows(tmp_path / "tasks", rows), "scenes", "<image>{{question}}")
    asked = run_cli(
        "evaluate", "run", "tasks=scenes", f"tasks_dir={tasks}", "chat=yes", "batch=5", cwd=tmp_path
    )
    assert asked.returncode == 0, asked.stderr
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    for when, subject in (("final", tmp_path / "run"), ("step-000000", SEES)):
        answers = own_answers(Loaded(find_subject(str(subject)), may_see=True), rows)
        right = [float(answer == row["answer"]) for answer, row in zip(answers, rows, strict=True)]
        assert 0 < sum(right) < len(rows)
        table = pd.read_parquet(tmp_path / f"run/evaluation/{when}/scenes.parquet")
        assert [json.loads(each)[0].strip() for each in table["answer"]] == answers
        assert list(table["value"]) == right
        assert found[when]["scenes"]["metrics"]["exact_match"]["value"] == pytest.approx(
            sum(right) / len(rows)
        )
    compared = json.loads(run_cli("compare", "run", "--json", cwd=tmp_path).stdout)["cells"]
    assert compared[0]["downstream/scenes"] == found["final"]["scenes"]["metrics"]["exact_match"]["value"]


def test_what_is_asked_is_known_by_what_it_holds(tmp_path: Path) -> None:
    """Another word, another pixel, another example in front: another digest; the same rows written again: the
    same."""

    def digest(rows: list[dict[str, Any]], **entries: Any) -> str:
        folder = write_rows(tmp_path / "tasks", rows)
        write_shown(folder, "scenes", "<image>{{question}}", **entries)
        return Harness(["scenes"], folder, None, True).digest("scenes")

    rows = shapes(4)
    plain = digest(rows)
    other_word = [{**rows[0], "question": "how many?"}, *rows[1:]]
    other_picture = [{**rows[0], "images": rows[1]["images"]}, *rows[1:]]
    assert len({plain, digest(other_word), digest(other_picture), digest(rows, num_fewshot=1)}) == 4
    assert digest(rows) == plain


def test_a_run_whose_model_reads_text_alone_is_refused_at_its_start(tmp_path: Path) -> None:
    tasks = write_shown(write_rows(tmp_path / "tasks", shapes(2)), "scenes", "<image>{{question}}")
    words = ["train.evaluate=word_problems", "evaluation.tasks=[scenes]", f"evaluation.tasks_dir={tasks}"]
    done = run_cli("train", *words, "tracking=none", f"run_dir={tmp_path}/run", cwd=tmp_path)
    assert done.returncode == 2
    assert "train.evaluate=word_problems: tasks=scenes: the questions have images" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "family",
    ["llava", "idefics3", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"],
)
def test_every_family_answers_as_rcpo_asks_it(family: str, tmp_path: Path) -> None:
    """Batches of questions with one and two images of several sizes, and without torchvision."""
    make_vision(tmp_path / "model", family)
    made = rows_with_images(tmp_path, 5, (1, 2))
    rows = [
        {
            "images": [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in row["images"]],
            "question": row["prompt"][0]["content"][-1]["text"], "answer": "a", "choices": ["a"],
        }
        for row in made
    ]  # fmt: skip
    text = "{% for each in images %}<image>{% endfor %}{{question}}"
    tasks = write_shown(write_rows(tmp_path / "tasks", rows), "pictures", text, 4)
    loaded = Loaded(find_subject(str(tmp_path / "model")), may_see=True)
    _, found = Harness(["pictures"], tasks, None, True).ask("pictures", loaded, 5)
    answers = [json.loads(each["answer"])[0].split() for each in found]
    assert answers == [each.split() for each in own_answers(loaded, rows, 4)]
    assert len({" ".join(each) for each in answers}) > 1


def test_mmmus_own_task_file_asks_rows_like_its_own(tmp_path: Path) -> None:
    """Its template and functions as lm-eval ships them: two images in one question, a choice by letter."""
    import lm_eval

    make_vision(tmp_path / "model", "qwen2_5_vl")
    shipped, folder = Path(lm_eval.__file__).parent / "tasks" / "mmmu", tmp_path / "tasks"
    folder.mkdir()
    for name in ("_template_yaml", "utils.py"):
        shutil.copy(shipped / name, folder)
    text, image = datasets.Value("string"), datasets.Image()
    names = ("question", "options", "answer", "question_type")
    features = datasets.Features(dict.fromkeys(names, text) | {"image_1": image, "image_2": image})
    row = ["<image 1> or <image 2> what is in it", "['a red', 'a blue']", "B", "multiple-choice"]
    shown = [{"bytes": png(seed), "path": None} for seed in (1, 2)]
    columns = {key: [value] * 3 for key, value in zip(features, [*row, *shown], strict=True)}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "rows.parquet")
    own = {"include": "_template_yaml", "task": "mmmu_here", "dataset_path": "parquet"}
    own["dataset_kwargs"] = {"data_files": {"validation": str(folder / "rows.parquet")}}
    own["generation_kwargs"] = {"until": ["</s>"], "do_sample": False, "max_gen_toks": 4}
    (folder / "mmmu_here.yaml").write_text(yaml.safe_dump(own))
    loaded = Loaded(find_subject(str(tmp_path / "model")), may_see=True)
    metrics, found = Harness(["mmmu_here"], folder, None, True).ask("mmmu_here", loaded, 2)
    assert metrics["acc"].value == pytest.approx(sum(each["value"] for each in found) / 3)
    assert [each["expected"] for each in found] == ["B"] * 3
    assert all(json.loads(each["answer"])[0] for each in found)


def test_text_tasks_are_asked_of_a_model_that_sees(tmp_path: Path) -> None:
    """By likelihood: what plain log-probabilities of the choices say; <image> is a word there."""
    rows = shapes(12)
    tasks = write_task(
        write_rows(tmp_path / "tasks", rows), "words", output_type="multiple_choice",
        doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target=0, target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    loaded = Loaded(find_subject(SEES), may_see=True)
    metrics, found = Harness(["words"], tasks, None, True).ask("words", loaded, 5)
    right = []
    for row in rows:
        prompt = loaded.asking.ids(user_turn(row["question"]))
        z = []
        for choice in row["choices"]:
            ids = loaded.tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps = loaded.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            z.append(sum(float(logps[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)))
        right.append(float(z[0] == max(z)))
    assert [each["value"] for each in found] == right
    assert metrics["acc"].value == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)


def test_an_adapter_and_a_checkpoint_answer_with_their_base(tmp_path: Path) -> None:
    make_vision(tmp_path / "model", "idefics3")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows_with_images(tmp_path, 12)))
    words = [f"model.path={tmp_path}/model", "data=file", f"data.path={pairs}", "data.eval_pairs=4"]
    words += ["model.lora.rank=2", "model.lora.save=adapter", "optim.lr=0.5", "train.pairs_per_step=4"]
    words += ["train.steps=2", "train.save_every=1", "tracking=none", f"run_dir={tmp_path}/run"]
    done = run_cli("train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [
        {
            "images": [{"bytes": png(seed), "path": None}],
            "question": "what is it",
            "answer": "a",
            "choices": ["a"],
        }
        for seed in range(4)
    ]
    tasks = write_shown(write_rows(tmp_path / "tasks", rows), "pictures", "<image>{{question}}", 4)
    own = []
    for words in ([], ["step=1"], ["step=0"]):
        run(f"{tmp_path}/run", "tasks=pictures", f"tasks_dir={tasks}", "chat=yes", "initial=no", *words)
        when = f"step-{int(words[0][5:]):06d}" if words else "final"
        table = pd.read_parquet(tmp_path / f"run/evaluation/{when}/pictures.parquet")
        subject = find_subject(f"{tmp_path}/run", words[0][5:] if words else None)
        own.append(own_answers(Loaded(subject, may_see=True), rows, 4))
        assert [json.loads(each)[0].split() for each in table["answer"]] == [each.split() for each in own[-1]]
    assert own[0] != own[2]


def test_tasks_that_cannot_be_asked_are_one_line(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "tasks", shapes(3))
    write_shown(folder, "scenes", "<image>{{question}}")
    write_shown(folder, "chosen", "<image>{{question}}", output_type="multiple_choice",
                doc_to_choice="{{choices}}", doc_to_target=0, metric_list=[{"metric": "acc"}])  # fmt: skip
    write_shown(folder, "heard", "{{question}}", doc_to_audio="images")
    write_shown(folder, "placeless", "{{question}}")
    for words, said in {
        (TINY, "scenes"): "tasks=scenes: the questions have images, and tiny reads text alone; give a vision",
        (
            SEES,
            "chosen",
        ): "tasks=chosen: shows images, and lm-eval asks such tasks for answers that are written "
        "alone; chosen has output_type multiple_choice: give one of generate_until",
        (SEES, "heard"): "tasks=heard: plays sounds",
        (SEES, "placeless"): r"tasks=placeless: lm-eval could not ask tiny_vision \(.*[Ii]mage",
        (
            SEES,
            "arithmetic",
        ): "tasks=arithmetic: asks text alone, and tiny_vision sees images; type tasks=yes_no",
    }.items():
        model, task = words
        with pytest.raises(UserError, match=said):
            run(model, f"tasks={task}", f"tasks_dir={folder}", "chat=yes")
