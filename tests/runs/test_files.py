"""Files and folders that are replaced whole or not at all."""

import multiprocessing
import os
from pathlib import Path

import pytest

from rcpo.common.files import path_beside, replacing, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("by_many", [False, True])
def test_a_file_is_replaced_and_nothing_left_beside(tmp_path: Path, by_many: bool) -> None:
    for content in ("the first, longer é", b"second"):
        write_atomically(tmp_path / "run.json", content, by_many)
    assert (tmp_path / "run.json").read_bytes() == b"second"
    assert names(tmp_path) == ["run.json"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_and_nothing_else(
    tmp_path: Path, is_folder: bool, error: type[BaseException]
) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as beside:
            (beside / "in").mkdir(parents=True) if is_folder else beside.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ["x"]
    assert path.read_text() == "old"


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    """A file, and a folder with something in it, which does not come into the new one."""
    path = tmp_path / "x"
    path_beside(path).write_text("half")
    write_atomically(path, "whole")
    path.unlink()
    (path_beside(path) / "left").mkdir(parents=True)
    with replacing(path) as beside:
        (beside / "new").mkdir(parents=True)
    assert names(tmp_path) == ["x"]
    assert names(path) == ["new"]


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file before its folder, all before the rename, and the folder around last; the old one is gone."""
    path = tmp_path / "final"
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "old").write_text("old")
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(str(tmp_path)))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        done.append(f"{source.name} -> {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    with replacing(path) as beside:
        (beside / "sub").mkdir(parents=True)
        (beside / "sub" / "a").write_text("a")
        (beside / "b").write_text("b")
    assert done == [
        "/.final.tmp/sub/a", "/.final.tmp/sub", "/.final.tmp/b", "/.final.tmp",
        "final -> .final.old", ".final.tmp -> final", "",
    ]  # fmt: skip
    assert names(tmp_path) == ["final"]
    assert names(path) == ["b", "sub"]


def write_often(path: Path, letter: str) -> None:
    for _ in range(30):
        write_atomically(path, letter * 100_000, by_many=True)


@pytest.mark.timeout(60)
def test_many_may_write_the_same_file(tmp_path: Path) -> None:
    """A reader never finds a mixture or a part."""
    path = tmp_path / "cache"
    write_atomically(path, "a" * 100_000)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, letter)) for letter in "bc"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content = path.read_text()
        assert len(content) == 100_000
        assert len(set(content)) == 1
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert names(tmp_path) == ["cache"]
