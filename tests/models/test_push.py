"""`rcpo export --push`: what is asked of the hub's client, what a dry run prints, what faults say, and what
arrives at a small hub on this machine through the client itself."""

import contextlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from helpers.loopback_hub import TOKEN, LoopbackHub, a_hub
from rcpo.cli import dispatch
from rcpo.commands.train import prepare
from rcpo.common.errors import UserError
from rcpo.models.load import model_place
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree


class FakeHub:
    """Notes what it is asked; `fault` is raised by the upload."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012
    fault: Exception | None = None

    def __init__(self, **options: Any) -> None:
        self.calls.append(("init", options))

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create", (repo_id, options)))

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        if self.fault is not None:
            raise self.fault
        files = {path.name: path.stat().st_size for path in folder_path.iterdir()}
        self.calls.append(("upload", (repo_id, files, commit_message)))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that is done, with the embedded model for its own."""
    config = prepare(["name=done", "train.device=cpu", f"run_dir={tmp_path / 'run'}"])
    assert config is not None
    made = RunFolder(tmp_path / "run")
    made.create(config, config_tree(config))
    shutil.copytree(model_place("builtin:tiny"), made.final)
    made.metrics.write_text('{"step": 7}\n')
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def run(real_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """The same; the hub's client is a fake."""
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "fault", None)
    return real_run


@pytest.fixture
def hub(real_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A hub on this machine, and its token in the environment."""
    with a_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.mark.parametrize("words", [[], ["--public"]], ids=" ".join)
def test_a_push_is_one_commit_of_the_whole_folder(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert dispatch(["export", "run", "out", "--push", "me/model", *words]) == 0
    files = {path.name: path.stat().st_size for path in Path("out").iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= files.keys()
    assert FakeHub.calls == [
        ("init", {"endpoint": None, "token": "hf_secret"}),
        ("create", ("me/model", {"private": not words, "exist_ok": True})),
        ("upload", ("me/model", files, "done, step 7, by rcpo")),
    ]
    assert 'from_pretrained("me/model")' in Path("out/README.md").read_text()
    said = capsys.readouterr().out
    assert said.endswith("pushed to https://hub/me/model/commit/1\n")
    assert "secret" not in said


def test_a_dry_run_prints_files_sizes_and_repository_and_leaves_nothing(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """No token is needed for it."""
    before = sorted(Path().rglob("*"))
    assert dispatch(["export", "run", "out", "--push", "me/model", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sorted(Path().rglob("*")) == before
    assert FakeHub.calls == []
    size = (run.final / "model.safetensors").stat().st_size
    assert any(line.split() == ["model.safetensors", f"{size:,}"] for line in said.splitlines())
    assert said.endswith("would push to me/model (private if it is new)\n")


def test_a_push_without_a_token_or_that_the_hub_refuses_is_one_line(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no token in the environment; type export HF_TOKEN="):
        dispatch(["export", "run", "out", "--push", "me/model"])
    assert not Path("out").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(FakeHub, "fault", ConnectionError("403\nForbidden"))
    with pytest.raises(UserError) as caught:
        dispatch(["export", "run", "out", "--push", "me/model"])
    assert str(caught.value) == (
        "--push me/model: the hub did not take it (403 Forbidden); out is written: mend that and type hf "
        "upload me/model out --private"
    )


def test_a_whole_model_has_nothing_to_merge(run: RunFolder) -> None:
    with pytest.raises(UserError, match="is a whole model already, without an adapter; leave --merge out"):
        dispatch(["export", "run", "out", "--merge"])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("storage", ["xet", "lfs"])
def test_what_arrives_at_a_hub_is_the_folder(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through huggingface_hub over HTTP, both ways in which it sends weights; a second push of another folder
    goes to the same repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", storage == "lfs")
    assert dispatch(["export", "run", "out", "--push", "me/model"]) == 0
    repository = hub.repositories["me/model"]
    assert repository.is_private
    assert repository.files == bytes_of(Path("out"))
    assert repository.messages == ["done, step 7, by rcpo"]
    assert any(path.startswith("/lfs/") for _, path in hub.requests) == (storage == "lfs")
    assert capsys.readouterr().out.endswith(f"pushed to {hub.url}/me/model/commit/{1:040x}\n")
    assert dispatch(["export", "run", "again", "--push", "me/model", "--public"]) == 0
    assert repository.is_private  # --public is of a new one
    assert repository.files == bytes_of(Path("again"))


def test_a_hub_that_says_no_or_is_not_there_gets_nothing(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run asks nothing; a token that may not write, and an address where nobody listens, are one line
    each, without the token."""
    assert dispatch(["export", "run", "dry", "--push", "me/model", "--dry-run"]) == 0
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError) as caught:
        dispatch(["export", "run", "out", "--push", "me/model"])
    assert str(caught.value) == (
        "--push me/model: the hub does not take the token in HF_TOKEN (401 Unauthorized); out is written: "
        "mend that and type hf upload me/model out --private"
    )
    monkeypatch.setattr(hub, "may_write", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(
        UserError, match="the token in HF_TOKEN may not write there \\(403 Forbidden\\); second"
    ):
        dispatch(["export", "run", "second", "--push", "me/model"])
    assert hub.repositories == {}
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as nobody:
        port = nobody.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError) as caught:
        dispatch(["export", "run", "other", "--push", "me/model", "--public"])
    said = str(caught.value)
    assert "Connection refused" in said
    assert said.endswith("; other is written: mend that and type hf upload me/model other")
    assert "hf_other" not in said
    assert Path("other/model.safetensors").is_file()
