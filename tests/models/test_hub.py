"""Models of the hub: of one commit, from the client's cache without a network, and every fault one line.

The cache is made as the client lays it out; where the hub is asked, its answer is stood in for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi, errors

from helpers.tiny_models import make_llama
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.schema import ModelConfig
from rcpo.config.validate import validate
from rcpo.models import hub
from rcpo.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from rcpo.models.commits import at_commit
from rcpo.models.hub import hub_folder
from rcpo.models.load import load_model, model_place
from rcpo.records import hub as records_hub
from rcpo.reference.cache import weights_fingerprint

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HF_HOME/hub with a repository of two commits: main is OLD."""
    folder = tmp_path / "home/hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._commit_of.cache_clear()
    for commit, seed in ((OLD, 0), (NEW, 1)):
        make_llama(seed=seed).save_pretrained(folder / "models--org--name/snapshots" / commit)
    point_main_at(folder, OLD)
    return folder


def point_main_at(cache: Path, commit: str) -> None:
    (cache / "models--org--name/refs").mkdir(exist_ok=True)
    (cache / "models--org--name/refs/main").write_text(commit)


def snapshot(cache: Path, commit: str) -> Path:
    return cache / "models--org--name/snapshots" / commit


def line(*args: Any) -> str:
    with pytest.raises(UserError) as caught:
        hub_folder(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("revision", "commit"), [(None, OLD), ("main", OLD), (OLD, OLD), (NEW, NEW)])
def test_what_is_here_is_read_without_a_network(cache: Path, revision: str | None, commit: str) -> None:
    assert hub_folder("org/name", revision, True, False) == snapshot(cache, commit)
    assert model_place("org/name", revision=revision) == str(snapshot(cache, commit))
    config = ModelConfig(path="org/name", revision=revision, dtype="float32")
    expected = load_model(ModelConfig(path=str(snapshot(cache, commit)), dtype="float32"))
    for ours, theirs in zip(load_model(config).parameters(), expected.parameters(), strict=True):
        assert ours.equal(theirs)


def test_a_commit_has_a_fingerprint_of_its_own(cache: Path) -> None:
    """The same whether it was named or found."""
    main, old, new = (
        weights_fingerprint(ModelConfig(path="org/name", revision=revision, dtype="float32"))
        for revision in (None, OLD, NEW)
    )
    assert main == old != new


def test_what_is_not_here_names_a_command(cache: Path) -> None:
    """Another repository; a revision that is not here; weights of which a part is not here."""
    assert line("org/other", None, True, False).startswith(
        "model.path=org/other: is not on this machine, and the hub cannot be reached ("
    )
    assert "type `hf download org/name --revision v2` where there is a network" in line(
        "org/name", "v2", True, False
    )
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    folder = snapshot(cache, OLD)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "type `hf download org/name` where there is a network" in line("org/name", None, True, False)
    assert hub_folder("org/name", None, False, False) == folder  # config and tokenizer are there


def test_the_hub_is_asked_once_for_its_commit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only files of that commit are fetched: not what lies in folders, pickled weights if they are
    asked for."""
    asked, fetched = list[str](), list[Any]()

    def answer(self: HfApi, path: str, revision: str | None, timeout: float) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(sha="c" * 40)

    def fetch(path: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("not here")
        fetched.append(options)
        return str(snapshot(cache, NEW))

    monkeypatch.setattr(HfApi, "model_info", answer)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda self, path, revision: [])
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for needs_weights in (True, False):
        assert hub_folder("org/name", None, needs_weights, needs_weights) == snapshot(cache, NEW)
    assert asked == ["org/name"]
    assert [options["revision"] for options in fetched] == ["c" * 40] * 2
    whole, small = (set(options["allow_patterns"]) for options in fetched)
    assert whole - small == {"model*.safetensors", "pytorch_model*.bin"}
    assert all(options["ignore_patterns"] == ["*/*"] for options in fetched)


def test_a_hub_that_is_not_reached_is_told_of(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is here is taken, with a warning; a reference that the objective does not read is not asked
    for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = list[str]()

    def fail(self: HfApi, path: str, **options: Any) -> None:
        asked.append(path)
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(HfApi, "model_info", fail)
    assert hub.commit_of("org/name", None) == OLD
    (record,) = caplog.records
    assert record.getMessage() == f"org/name: the hub cannot be reached; commit {OLD} is here, and is taken"
    tree = compose(["objective=simpo", "reference.path=org/unread"])
    assert tree is not None
    config = resolve(validate(tree), None)
    assert at_commit(config) == config
    assert asked == ["org/name"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (errors.GatedRepoError, "model.path=org/name: access to it must be asked for on its page of the hub"),
        (errors.RepositoryNotFoundError, "model.path=org/name: the hub has no such model, or it is private;"),
        (errors.RevisionNotFoundError, "model.revision=v9: org/name has no such branch, tag or commit;"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, fault: type[errors.HfHubHTTPError], said: str
) -> None:
    answer = httpx.Response(404, request=httpx.Request("GET", "https://localhost"))

    def refuse(*args: Any, **options: Any) -> None:
        raise fault("no", response=answer)

    monkeypatch.setattr(HfApi, "model_info", refuse)
    assert line("org/name", "v9", True, False).startswith(said)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.revision=v1: .* is a folder, which has one state alone;"):
        model_place(str(tmp_path), revision="v1")


@pytest.mark.ci("real processes")
@pytest.mark.timeout(750)
def test_a_run_keeps_its_commit(cache: Path, tmp_path: Path) -> None:
    """config.yaml has what main was; when main moves on, the run goes on with its own, and a new run has the
    new one."""
    for commit in (OLD, NEW):
        shutil.copytree(Path(model_place("builtin:tiny")), snapshot(cache, commit), dirs_exist_ok=True)
    words = [
        "model.path=org/name", "train.steps=2", "train.eval_every=0", "train.pairs_per_step=2",
        "data.eval_pairs=2", "data.train_pairs=8", "tracking=none", "optim.lr=1e-5", "train.save_every=1",
    ]  # fmt: skip
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def revision(run: str) -> str:
        config = (tmp_path / run / "config.yaml").read_text()
        return config.partition("revision: ")[2].split()[0]

    def rcpo(*typed: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "rcpo.cli", *typed],
            cwd=tmp_path, env=os.environ | env, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    rcpo("train", *words, "run_dir=first")
    assert revision("first") == OLD
    point_main_at(cache, NEW)
    rcpo("resume", "first", "--allow-change", "train.steps=3")
    assert revision("first") == OLD
    tree = compose([*words, f"run_dir={tmp_path / 'second'}"])
    assert tree is not None
    assert at_commit(resolve(validate(tree), None)).model.revision == NEW


def test_a_run_keeps_the_commits_of_its_adapter_and_its_data(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter's files are read at that commit, its older one too; a folder has none."""
    for commit in (OLD, NEW):
        folder = cache / "models--org--adapter/snapshots" / commit
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_text(json.dumps({"r": 1 if commit == OLD else 2}))
        (folder / WEIGHTS_FILE).write_bytes(b"")
    (cache / "models--org--adapter/refs").mkdir()
    (cache / "models--org--adapter/refs/main").write_text(NEW)
    monkeypatch.setattr(records_hub, "commit_of_data", lambda name: OLD)
    tree = compose([
        "model.path=org/name", "model.lora.rank=2", "model.lora.adapter=org/adapter",
        "model.lora.on_adapter=stack", "data=file", "data.path=org/pairs",
    ])  # fmt: skip
    assert tree is not None
    kept = at_commit(resolve(validate(tree), None))
    assert (kept.model.revision, kept.model.lora.adapter_revision) == (OLD, NEW)
    assert kept.data.revision == {"org/pairs": OLD}
    assert at_commit(kept) == kept
    assert [read_adapter_config("org/adapter", revision)["r"] for revision in (OLD, NEW, None)] == [1, 2, 2]
    with pytest.raises(UserError, match=r"^model\.lora\.adapter=org/other: is not on this machine, and the"):
        read_adapter_config("org/other")
    with pytest.raises(UserError, match=r"^model\.lora\.adapter_revision=v1: \S+ is a folder, which has one"):
        read_adapter_config(str(folder), "v1")
