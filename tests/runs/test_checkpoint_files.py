"""Checkpoints as files: complete or absent, and a damaged one is noticed. What is inside is tested with real
runs."""

import json
import os
import shutil
from pathlib import Path

import pytest

from rcpo.common.errors import UserError
from rcpo.common.files import sha256
from rcpo.runs.folder import RunFolder
from rcpo.training.checkpoint import _complete, check_manifest, checkpoint_path, newest_checkpoint

FILES = {
    "state.json": b'{"step": 3}',
    "engine/engine/weights.pt": b"\x00" * 1000,
    "rng/rank-0000.safetensors": b"r",
}


def write_checkpoint(run: RunFolder, step: int) -> Path:
    place = checkpoint_path(run, step)
    beside = place.with_name(f".{place.name}.tmp")
    for name, content in FILES.items():
        (beside / name).parent.mkdir(parents=True, exist_ok=True)
        (beside / name).write_bytes(content)
    _complete(beside, place)
    return place


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_manifest_lists_every_other_file_with_size_and_checksum(run: RunFolder) -> None:
    """The SHA-256 of b"r" is 454349e4..., a value from outside; nothing is left beside."""
    place = write_checkpoint(run, 3)
    manifest = json.loads((place / "manifest.json").read_text())
    assert set(manifest) == set(FILES)
    assert {name: entry["bytes"] for name, entry in manifest.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    expected = "454349e422f05297191ead13e21d3db520e5abef52055e4964b82fb213f593a1"
    assert manifest["rng/rank-0000.safetensors"]["sha256"] == expected
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000003"]
    check_manifest(place)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_noticed(run: RunFolder, name: str, damage: str) -> None:
    """One bit flipped (same size), one byte cut off, or the file gone: one line with the name and what to
    do."""
    place = write_checkpoint(run, 3)
    file, content = place / name, FILES[name]
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError) as caught:
        check_manifest(place)
    assert str(caught.value) == (
        f"{place}: {name} is missing or damaged; remove this checkpoint to use the one before it"
    )


@pytest.mark.parametrize("content", [None, "", '{"state.json": {"byt'])
def test_damaged_manifest_is_noticed(run: RunFolder, content: str | None) -> None:
    place = write_checkpoint(run, 3)
    (place / "manifest.json").unlink()
    if content is not None:
        (place / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is missing or damaged; remove this checkpoint"):
        check_manifest(place)


def test_newest_is_by_step_and_complete_only(run: RunFolder) -> None:
    """Step 1000000 is newer than 999999 though its name sorts first; unfinished and manifest-less ones do not
    count."""
    assert newest_checkpoint(run) is None
    for step in (5, 20):
        write_checkpoint(run, step)
    assert newest_checkpoint(run) == checkpoint_path(run, 20)
    checkpoint_path(run, 30).mkdir()
    (run.checkpoints / ".step-000040.tmp").mkdir()
    (run.checkpoints / ".step-000040.tmp" / "manifest.json").write_text("{}")
    assert newest_checkpoint(run) == checkpoint_path(run, 20)
    for step in (999_999, 1_000_000):
        write_checkpoint(run, step)
    assert newest_checkpoint(run) == checkpoint_path(run, 1_000_000)


def test_saving_the_same_step_again_replaces_it(run: RunFolder) -> None:
    """As after a rewind: the old content is gone, the new is whole."""
    place = write_checkpoint(run, 3)
    (place / "state.json").write_text("old")
    (place / "leftover").write_text("old")
    assert write_checkpoint(run, 3) == place
    check_manifest(place)
    assert not (place / "leftover").exists()


@pytest.mark.parametrize("num_renames", [0, 1, 2])
def test_a_crash_while_one_takes_the_place_of_another_leaves_one_whole(
    run: RunFolder, num_renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power fails before the first, second or third rename of the folders (old away, new in): at each moment
    the newest checkpoint is a whole one, the old before the second rename and the new after it; saving once
    more then leaves it alone in the folder."""
    write_checkpoint(run, 2)
    old = write_checkpoint(run, 3)
    created = (old / "manifest.json").stat().st_ino
    replace, renames = os.replace, []

    def replace_or_fail(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            if len(renames) == num_renames:
                raise OSError("power failure")
            renames.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    if num_renames == 2:
        monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
        write_checkpoint(run, 3)
    else:
        with pytest.raises(OSError, match="power failure"):
            write_checkpoint(run, 3)
    monkeypatch.undo()
    newest = newest_checkpoint(run)
    assert newest is not None
    check_manifest(newest)
    assert ((newest / "manifest.json").stat().st_ino == created) == (num_renames < 2)
    assert newest.name == (".step-000003.old" if num_renames == 1 else "step-000003")
    write_checkpoint(run, 3)
    assert newest_checkpoint(run) == checkpoint_path(run, 3)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000002", "step-000003"]


def test_everything_is_on_disk_before_the_checkpoint_has_its_name(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and every folder of it is fsynced first, the folder of checkpoints after the rename."""
    synced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        synced.append(f"-> {target}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    place = write_checkpoint(run, 3)
    monkeypatch.undo()
    beside = run.checkpoints / ".step-000003.tmp"
    before = set(synced[: synced.index(f"-> {place}")])
    parts = [place, *place.rglob("*")]
    assert {str(beside / part.relative_to(place)) for part in parts} <= before
    assert synced[-1] == str(run.checkpoints)


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    """FIPS 180-2's example: "abc"."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_rewind_drops_later_rows_and_a_cut_last_line(run: RunFolder) -> None:
    """Steps 1, 2, 3 and half a line; rewound to 2, then a copy of the folder reads the same."""
    run.metrics.write_text(
        '{"step": 1, "x": null}\n{"step": 2, "x": "inf"}\n{"step": 3, "x": 1.5}\n{"step": 4, "x'
    )
    assert [row["step"] for row in run.rows(run.metrics)] == [1, 2, 3]
    run.rewind(2)
    assert run.metrics.read_text() == '{"step": 1, "x": null}\n{"step": 2, "x": "inf"}\n'
    shutil.copy(run.metrics, run.path / "copy.jsonl")
    assert run.rows(run.path / "copy.jsonl")[1] == {"step": 2, "x": float("inf")}
