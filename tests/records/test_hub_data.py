"""Data sets of the hub: of one commit, without a network from what `datasets` keeps, and every fault one
line.

What `datasets` keeps is laid out as it does; where the hub is asked, its answer is stood in for."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import httpx
import pytest
from huggingface_hub import HfApi, errors

from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.evaluation import EvaluationConfig
from rcpo.config.resolve import resolve
from rcpo.config.schema import DataConfig
from rcpo.config.validate import validate
from rcpo.evaluation.questions import read_questions
from rcpo.models.commits import at_commit
from rcpo.records import hub
from rcpo.records.places import Place, training_place
from rcpo.records.readers import hub_fingerprint, read_rows

OLD, NEW = "a" * 40, "b" * 40
PLACE = Place("org/My-Pairs", None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two commits of org/My-Pairs, whose one row says which; NEW was read last. No network."""
    folder = tmp_path / "kept"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
    for target in ("huggingface_hub.constants.HF_HUB_OFFLINE", "datasets.config.HF_HUB_OFFLINE"):
        monkeypatch.setattr(target, True)
    hub.commit_of_data.cache_clear()
    for number, commit in enumerate((OLD, NEW)):
        keep(folder, commit, {"prompt": [commit], "chosen": ["x"], "rejected": ["y"]}, number)
    return folder


def keep(folder: Path, commit: str, rows: dict[str, Any], age: int, config: str = "default") -> None:
    """As `datasets` keeps a data set that it has read from the hub."""
    source = folder.parent / f"{config}-{commit}.jsonl"
    datasets.Dataset.from_dict(rows).to_json(source)
    builder = datasets.load_dataset_builder(
        "json", data_files=str(source), cache_dir=str(folder.parent / "b")
    )
    builder.download_and_prepare()
    place = folder / "org___my-pairs" / config / "0.0.0" / commit
    place.parent.mkdir(parents=True, exist_ok=True)
    Path(builder.cache_dir).rename(place)
    (place / "json-train.arrow").rename(place / "my-pairs-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"dataset_name": "my-pairs", "config_name": config}
    info["splits"]["train"]["dataset_name"] = "my-pairs"
    (place / "dataset_info.json").write_text(json.dumps(info))
    os.utime(place, (age, age))


def prompt_of(place: Place) -> str:
    (row,) = read_rows(place, {"prompt"}).rows
    return str(row["prompt"])


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, NEW), (OLD, OLD), (NEW, NEW), ({PLACE.path: OLD}, OLD), ({}, NEW)],
    ids=str,
)
def test_what_is_here_is_read_without_a_network(cache: Path, revision: Any, commit: str) -> None:
    """Also the older of two commits, where `datasets` alone would take the newer."""
    assert prompt_of(dataclasses.replace(PLACE, revision=revision)) == commit


def test_a_commit_that_is_not_here_is_one_line(cache: Path) -> None:
    """And so is a branch, of which it is not known what it is."""
    for revision in ("c" * 40, "v2"):
        with pytest.raises(UserError) as caught:
            read_rows(dataclasses.replace(PLACE, revision=revision), {"prompt"})
        said = str(caught.value)
        assert "\n" not in said
        assert said.startswith(
            f"data.path={PLACE.path}: is not on this machine, and the hub cannot be reached"
        )
        command = f"hf download --repo-type dataset {PLACE.path} --revision {revision} --local-dir FOLDER"
        assert f"type `{command}` where there is a network" in said


def test_a_config_of_its_own(cache: Path) -> None:
    keep(cache, OLD, {"prompt": ["other"], "chosen": ["x"], "rejected": ["y"]}, 5, "other")
    place = dataclasses.replace(PLACE, revision=OLD)
    assert prompt_of(dataclasses.replace(place, config="other")) == "other"
    assert prompt_of(dataclasses.replace(place, config="default")) == OLD


def test_the_hub_is_asked_once_and_the_run_keeps_its_answer(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every data set that is read, by its own revision; folders and generated problems have none."""
    asked = list[tuple[str, str | None]]()

    def answer(self: HfApi, path: str, revision: str | None, timeout: float) -> SimpleNamespace:
        asked.append((path, revision))
        return SimpleNamespace(sha={"org/My-Pairs": OLD}.get(path, NEW))

    monkeypatch.setattr(HfApi, "dataset_info", answer)
    config = DataConfig(
        source="file", path=["org/My-Pairs", str(cache)], eval_path="org/held-out",
        revision={"org/held-out": "v2"},
    )  # fmt: skip
    for _ in range(2):
        assert hub.revisions_at_commits(config) == {"org/My-Pairs": OLD, "org/held-out": NEW}
    assert sorted(asked) == [("org/My-Pairs", None), ("org/held-out", "v2")]
    assert hub.revisions_at_commits(dataclasses.replace(config, path=str(cache), eval_path=None)) == {
        "org/held-out": "v2"
    }
    assert hub.revisions_at_commits(DataConfig(source="arithmetic")) is None
    frozen = dataclasses.replace(config, path="org/My-Pairs", revision=hub.revisions_at_commits(config))
    assert prompt_of(training_place(frozen)) == OLD


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (errors.GatedRepoError, "data.path=org/My-Pairs: access to it must be asked for on its page of"),
        (errors.RepositoryNotFoundError, "data.path=org/My-Pairs: the hub has no such data set, or it is"),
        (errors.RevisionNotFoundError, "data.revision=v9: org/My-Pairs has no such branch, tag or commit;"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, fault: type[errors.HfHubHTTPError], said: str
) -> None:
    answer = httpx.Response(404, request=httpx.Request("GET", "https://localhost"))

    def refuse(*args: Any, **options: Any) -> None:
        raise fault("no", response=answer)

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(UserError) as caught:
        read_rows(dataclasses.replace(PLACE, revision="v9"), {"prompt"})
    assert str(caught.value).startswith(said)


def test_tokens_are_kept_by_commit(cache: Path) -> None:
    """Named or found, a commit is one; another is another."""
    old, new, found = (
        hub_fingerprint(dataclasses.replace(PLACE, revision=revision)) for revision in (OLD, NEW, None)
    )
    assert old != new == found


def test_questions_are_of_one_commit_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `rcpo evaluate` asks says which, a run keeps it, and faults name the key of the questions."""
    commit = "c" * 40
    keep(cache, commit, {"question": ["is it ?"], "answer": ["yes"], "category": ["random"]}, 9)
    asked = EvaluationConfig(name="yes_no", tasks=["yes_no"], questions=str(PLACE.path))
    found = read_questions(asked)
    assert found.source == f"org/My-Pairs@{commit}"
    assert [each.text for each in found.questions] == ["is it ?"]
    tree = compose([
        "train.evaluate=yes_no", "evaluation=yes_no", "evaluation.questions=org/My-Pairs", "tracking=none",
    ])  # fmt: skip
    assert tree is not None
    kept = at_commit(resolve(validate(tree), None)).evaluation
    assert kept.questions_revision == commit
    keep(cache, "d" * 40, {"question": ["another ?"], "answer": ["no"]}, 4 * 10**9)
    hub.commit_of_data.cache_clear()
    assert read_questions(kept).source == found.source
    assert read_questions(asked).source == f"org/My-Pairs@{'d' * 40}"
    with pytest.raises(UserError, match=r"^questions=org/My-Pairs: is not on this machine, and the hub cann"):
        read_questions(dataclasses.replace(asked, questions_revision="v9"))
    with pytest.raises(UserError, match=r"^questions=org/My-Pairs: has neither a column text nor question"):
        read_questions(dataclasses.replace(asked, questions_revision=OLD))
