"""The folder of tokenised pairs: what comes back, damage, full disks, and processes that come together."""

import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

import rcpo.data.token_store
from rcpo.common.errors import UserError
from rcpo.common.files import path_beside
from rcpo.data.packer import pack
from rcpo.data.pairs import TokenizedPair, TokenizedSide
from rcpo.data.token_store import Tokens, TokenStore
from rcpo.records.account import Account, RowAccount

PAIRS = [
    TokenizedPair(TokenizedSide([1, 5, 6], 2), TokenizedSide([1, 5, 70000, 8], 2), 4, weight=0.1),
    TokenizedPair(TokenizedSide([1, 2], 1), TokenizedSide([1, 9], 1), 2**40, weight=1 / 3),
]
ACCOUNT = Account(
    RowAccount("a.jsonl", 4, {"it is «é»": [2]}, trained=3), RowAccount("b.jsonl", 1, held_out=1), [0]
)
TOKENS = Tokens(pack(PAIRS), pack(PAIRS[:1]), ["4 rows read, 0 dropped", "«é»\n⟦"], ACCOUNT)


@pytest.fixture(autouse=True)
def warnings_anew() -> None:
    """Each test is a process of its own as to what has been warned of."""
    rcpo.data.token_store._warn_once.cache_clear()


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "tokens", "key")


def must_not_be_called() -> Tokens:
    raise AssertionError("made again")


def always() -> bool:
    return True


def test_what_was_kept_comes_back(store: TokenStore) -> None:
    """Every id, split, row, weight and line, from another object; and nothing is made again."""
    assert store.read() is None
    for tokens in (
        store.read_or_make(lambda: TOKENS, always),
        TokenStore(store.path.parent, "key").read_or_make(must_not_be_called, always),
    ):
        assert tokens == TOKENS
    assert TokenStore(store.path.parent, "other").read() is None


def test_the_arrays_are_views_of_mapped_files_that_nobody_can_write(store: TokenStore) -> None:
    """All arrays lie within the addresses at which the system has mapped the folder's files, read-only."""
    tokens = store.read_or_make(lambda: TOKENS, always)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [(words[1], words[0].split("-")) for words in maps if words[-1].startswith(f"{store.path}/")]
    assert [rights for rights, _ in mapped] == ["r--s"] * 18
    spans = [[int(address, 16) for address in span] for _, span in mapped]
    for array in (*tokens.train.arrays, *tokens.held_out.arrays, tokens.train[1].chosen.ids):
        assert type(array) is np.ndarray
        assert any(start <= array.__array_interface__["data"][0] < end for start, end in spans)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_the_files_are_as_open_as_the_users_other_files(store: TokenStore) -> None:
    """Many share a cache."""
    store.write(TOKENS)
    beside = store.path.with_name("another")
    beside.touch()
    assert {file.stat().st_mode for file in store.path.iterdir()} == {beside.stat().st_mode}


def flipped(content: bytes, where: int) -> bytes:
    return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


def test_damage_at_any_byte_is_seen(store: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    """In every file every single byte changed, all kinds of ends, and the file gone."""
    store.write(TOKENS)
    files = sorted(store.path.iterdir())
    assert len(files) == 19
    for file in files:
        whole = file.read_bytes()
        damaged = [flipped(whole, where) for where in range(len(whole))]
        damaged += [whole[:length] for length in range(0, len(whole), 50)]
        damaged += [b"[]", b"{}", b"[" * 10_000, b"null", b"\xff", whole + b"\0"]
        for content in damaged:
            file.write_bytes(content)
            assert store.read() is None, content
        file.unlink()
        assert store.read() is None
        file.write_bytes(whole)
    assert store.read() == TOKENS
    assert f"{store.path} cannot be read (" in caplog.text


def test_a_damaged_folder_is_named_and_replaced(store: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    store.write(TOKENS)
    file = store.path / "train.ids.npy"
    content = file.read_bytes()
    file.write_bytes(flipped(content, len(content) - 1))
    assert store.read_or_make(lambda: TOKENS, always).train == PAIRS
    assert [record.getMessage() for record in caplog.records] == [
        f"{store.path} cannot be read (it is not what was written): the data are tokenised again, and it is "
        "replaced"
    ]
    assert file.read_bytes() == content
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["key", "key.lock"]


def test_what_a_killed_process_left_is_ignored_and_removed(store: TokenStore) -> None:
    left = path_beside(store.path)
    left.mkdir(parents=True)
    (left / "train.ids.npy").write_bytes(b"half")
    assert store.read_or_make(lambda: TOKENS, always).train == PAIRS
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["key", "key.lock"]


def test_what_nobody_has_used_for_long_is_removed_and_said(
    store: TokenStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Folders, and files of other versions; reading is use."""
    caplog.set_level(logging.INFO)
    long_ago = time.time() - 31 * 86400
    stores = [TokenStore(store.path.parent, key) for key in ("unread", "read", "new")]
    for old in stores[:2]:
        old.write(TOKENS)
        os.utime(old.path, (long_ago, long_ago))
    (store.path.parent / "older.safetensors").touch()
    os.utime(store.path.parent / "older.safetensors", (long_ago, long_ago))
    assert stores[1].read() == TOKENS
    stores[2].write(TOKENS)
    assert sorted(path.name for path in store.path.parent.iterdir()) == ["new", "read"]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{store.path.parent}/{name}: removed, because nobody has used it for 30 days"
        for name in ("older.safetensors", "unread")
    ]


def test_a_folder_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the folder should be is a file: the pairs are made each time, and that is said once."""
    (tmp_path / "file").write_text("")
    store = TokenStore(tmp_path / "file" / "tokens", "key")
    for _ in range(2):
        assert store.read_or_make(lambda: TOKENS, always) == TOKENS
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    said = warning.getMessage()
    assert said.startswith(f"{tmp_path}/file/tokens cannot be written (")
    assert said.endswith("every start tokenises the data again")


def test_a_full_disk_is_a_warning_and_leaves_nothing(
    store: TokenStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert store.read_or_make(lambda: TOKENS, always) == TOKENS
    assert "cannot be written ([Errno 28] No space left on device)" in caplog.text
    assert [path.name for path in store.path.parent.iterdir()] == ["key.lock"]


def test_bad_data_leave_nothing_and_are_told_each_time(store: TokenStore) -> None:
    def refuse() -> Tokens:
        raise UserError("data: row 3 cannot train")

    for _ in range(2):
        with pytest.raises(UserError, match="row 3"):
            store.read_or_make(refuse, always)
    assert not store.path.exists()


def test_data_that_changed_while_they_were_read_are_not_kept(store: TokenStore) -> None:
    assert store.read_or_make(lambda: TOKENS, lambda: False) == TOKENS
    assert not store.path.exists()


def make_slowly(folder: Path, number: int) -> None:
    """What each process of the test below does: says that it makes the pairs, and what it got."""

    def make() -> Tokens:
        (folder / f"made-{number}").touch()
        time.sleep(0.5)
        return TOKENS

    tokens = TokenStore(folder / "tokens", "key").read_or_make(make, always)
    (folder / f"got-{number}").write_text(json.dumps([tokens.train == PAIRS, tokens.report]))


@pytest.mark.timeout(60)
def test_processes_that_come_together_make_the_pairs_once(tmp_path: Path) -> None:
    """Four: one makes them, the others wait for it."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make_slowly, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert [json.loads(path.read_text()) for path in tmp_path.glob("got-*")] == [[True, TOKENS.report]] * 4
