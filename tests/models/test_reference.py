"""Reference log-probs: what a key depends on, what the cache keeps, and that runs can share it."""

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import make_batch, make_llama, make_neox, make_pairs
from rcpo.common.errors import UserError
from rcpo.config.schema import ModelConfig
from rcpo.data.mismatched import Mismatch
from rcpo.data.pairs import SideLogProbs
from rcpo.data.tokenize import TokenizedPair, TokenizedSide
from rcpo.reference.cache import (
    ReferenceCache,
    reference_logprobs,
    shared_reference,
    side_key,
    weights_fingerprint,
)
from rcpo.reference.table import ReferenceTable


def lengths_as_logprobs(pairs: Sequence[TokenizedPair]) -> SideLogProbs:
    """A stand-in for the model: z = -(number of ids), so that every value can be told."""
    z_w = torch.tensor([-float(len(pair.chosen.input_ids)) for pair in pairs])
    z_l = torch.tensor([-float(len(pair.rejected.input_ids)) for pair in pairs])
    return SideLogProbs(z_w, z_l)


def test_key_tells_ids_and_where_the_response_begins() -> None:
    """Same ids and split: same key. Another split, order, length or id: another key. 16 bytes each."""
    key = side_key(TokenizedSide([1, 5, 6], 1))
    assert key == side_key(TokenizedSide([1, 5, 6], 1))
    others = [
        TokenizedSide([1, 5, 6], 2),
        TokenizedSide([1, 6, 5], 1),
        TokenizedSide([1, 5, 6, 6], 1),
        TokenizedSide([1, 5, 7], 1),
        TokenizedSide([5, 6], 1),
    ]
    keys = {key, *(side_key(side) for side in others)}
    assert len(keys) == 6
    assert {len(one) for one in keys} == {16}


def test_fingerprint_is_of_weights_and_dtype_only(tmp_path: Path) -> None:
    """A copy elsewhere, tokenizer files and settings that change no number: same. Weights or dtype:
    another."""
    for name, model in (
        ("a", make_llama()),
        ("copy", make_llama()),
        ("other", make_llama(seed=1)),
        ("x", make_neox()),
    ):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")

    def fingerprint(name: str, **settings: object) -> str:
        return weights_fingerprint(ModelConfig(path=str(tmp_path / name), **{"dtype": "float32", **settings}))

    first = fingerprint("a")
    assert fingerprint("copy", gradient_checkpointing=True, chat_template="plain") == first
    assert len({first, fingerprint("other"), fingerprint("x"), fingerprint("a", dtype="bfloat16")}) == 4


def test_cache_is_empty_then_keeps_and_overwrites_rows() -> None:
    """Values come back as the fp32 that they were, from a second object with the same fingerprint only."""
    cache = ReferenceCache("f")
    assert cache.path.parent.parent == Path(os.environ["RCPO_CACHE"])
    assert cache.read() == {}
    cache.merge({b"a" * 16: -1.5, b"b" * 16: -0.1})
    cache.merge({b"b" * 16: -7.25, b"c" * 16: 3.0})
    assert ReferenceCache("f").read() == {b"a" * 16: -1.5, b"b" * 16: -7.25, b"c" * 16: 3.0}
    assert ReferenceCache("g").read() == {}
    assert [path.suffix for path in cache.path.parent.iterdir()] == [".safetensors"]


def test_merging_nothing_makes_no_file() -> None:
    cache = ReferenceCache("f")
    cache.merge({})
    assert not cache.path.exists()


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64])
def test_a_damaged_cache_is_computed_again(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It reads as empty, with a warning that names it, and the next merge repairs it."""
    cache = ReferenceCache("f")
    cache.merge({b"a" * 16: -1.0})
    cache.path.write_bytes(content)
    assert cache.read() == {}
    assert f"{cache.path} cannot be read" in caplog.text
    cache.merge({b"b" * 16: -2.0})
    assert cache.read() == {b"b" * 16: -2.0}


def add_rows(writer: int, num_rows: int) -> None:
    """What each process of the test below does: rows of its own, one merge each, the file whole after every
    one."""
    cache = ReferenceCache("shared")
    for row in range(num_rows):
        with cache.lock().acquire(timeout=60):
            cache.merge({bytes([writer, row] * 8): float(writer * 100 + row)})
        assert bytes([writer, row] * 8) in cache.read()


@pytest.mark.timeout(120)
def test_processes_that_merge_at_the_same_time_lose_nothing() -> None:
    """4 processes x 10 merges: 40 rows; a reader meanwhile never sees a broken file or fewer rows than
    before."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_rows, args=(writer, 10)) for writer in range(4)]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes):
        if (path := ReferenceCache("shared").path).is_file():
            num_rows = len(load_file(path)["z"])
            assert num_rows >= seen
            seen = num_rows
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    expected = {bytes([w, r] * 8): float(w * 100 + r) for w in range(4) for r in range(10)}
    assert ReferenceCache("shared").read() == expected


def ask_for_reference(cell: int, folder: Path) -> None:
    """What each cell of the test below does: half of its pairs are its own, half are everybody's; computing
    takes a while and leaves a line for each pair."""

    def compute(pairs: Sequence[TokenizedPair]) -> SideLogProbs:
        time.sleep(0.3)
        with (folder / "computed").open("a") as stream:
            stream.write("".join(f"{pair.row}\n" for pair in pairs))
        return lengths_as_logprobs(pairs)

    pairs = make_pairs(4, seed=1) + [
        dataclasses.replace(pair, row=100 + cell) for pair in make_pairs(1, seed=10 + cell)
    ]
    values, _ = shared_reference(ReferenceCache("grid"), pairs, compute)
    assert torch.equal(values.z_w, lengths_as_logprobs(pairs).z_w)


@pytest.mark.timeout(120)
def test_cells_that_start_together_compute_each_pair_once(tmp_path: Path) -> None:
    """16 processes, 4 pairs in common and 1 of its own each: 20 pairs computed, none twice. (pitfall: a grid
    that computes its reference once a cell)"""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask_for_reference, args=(cell, tmp_path)) for cell in range(16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 16
    computed = sorted(int(row) for row in (tmp_path / "computed").read_text().split())
    assert computed == [0, 1, 2, 3, *range(100, 116)]


def test_a_full_cache_needs_no_turn(tmp_path: Path) -> None:
    """While another holds the lock, a run that finds every pair goes on at once."""
    pairs = make_pairs(3)
    shared_reference(ReferenceCache("f"), pairs, lengths_as_logprobs)

    def refuse(missing: Sequence[TokenizedPair]) -> SideLogProbs:
        raise AssertionError("nothing is missing")

    with ReferenceCache("f").lock().acquire(timeout=0):
        with pytest.raises(TimeoutError):
            ReferenceCache("f").lock().acquire(timeout=0.05)
        values, num_computed = shared_reference(ReferenceCache("f"), pairs, refuse)
    assert num_computed == 0
    assert torch.equal(values.z_l, lengths_as_logprobs(pairs).z_l)


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where the folder should be: the run gets its numbers, and the log says what is lost."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path / "file"))
    pairs = make_pairs(3)
    values, num_computed = shared_reference(ReferenceCache("f"), pairs, lengths_as_logprobs)
    assert num_computed == 6
    assert torch.equal(values.z_w, lengths_as_logprobs(pairs).z_w)
    assert [record.message.partition(" cannot be ")[2].partition(" ")[0] for record in caplog.records] == [
        "locked", "written",
    ]  # fmt: skip


def test_code_counts_where_it_is_trusted(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path)
    config = {"path": str(tmp_path), "dtype": "float32"}
    plain = weights_fingerprint(ModelConfig(**config))
    (tmp_path / "modeling.py").write_text("x = 1")
    assert weights_fingerprint(ModelConfig(**config)) == plain
    trusted = weights_fingerprint(ModelConfig(**config, trust_remote_code=True))
    (tmp_path / "modeling.py").write_text("x = 2")
    assert len({plain, trusted, weights_fingerprint(ModelConfig(**config, trust_remote_code=True))}) == 3


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_table_is_one_line(tmp_path: Path, damage: str) -> None:
    """As a run that is resumed would find it."""
    path = tmp_path / "reference.safetensors"
    if damage != "missing":
        ReferenceTable(*(SideLogProbs(torch.zeros(2), torch.zeros(2)) for _ in range(2))).save(path)
        path.write_bytes(path.read_bytes()[:-3])
    if damage == "other":
        save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is missing or damaged, and displacement is measured against it"):
        ReferenceTable.load(path)


def test_only_what_is_missing_is_computed() -> None:
    """Of 5 pairs, 0, 1 and 3 are known: 2 and 4 are computed in one call; with all known there is no call at
    all."""
    pairs = make_pairs(5, seed=4)
    first, known = reference_logprobs([pairs[0], pairs[1], pairs[3]], {}, lengths_as_logprobs)
    torch.testing.assert_close(first.z_w, lengths_as_logprobs([pairs[0], pairs[1], pairs[3]]).z_w)
    calls: list[list[int]] = []

    def compute(missing: Sequence[TokenizedPair]) -> SideLogProbs:
        calls.append([pair.row for pair in missing])
        return lengths_as_logprobs(missing)

    result, fresh = reference_logprobs(pairs, known, compute)
    assert calls == [[2, 4]]
    assert set(fresh) == {
        side_key(side) for idx in (2, 4) for side in (pairs[idx].chosen, pairs[idx].rejected)
    }
    expected = lengths_as_logprobs(pairs)
    assert torch.equal(result.z_w, expected.z_w)
    assert torch.equal(result.z_l, expected.z_l)
    _, nothing = reference_logprobs(pairs, known | fresh, compute)
    assert (nothing, len(calls)) == ({}, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_reference_that_is_not_finite_is_never_kept(bad: float) -> None:
    """It would otherwise stay in the cache for every later run."""
    with pytest.raises(
        RuntimeError, match=r"^data row 0: reference log-probs are -4\.0 and (nan|-inf), which must be"
    ):
        reference_logprobs(
            make_pairs(1), {}, lambda pairs: SideLogProbs(torch.tensor([-4.0]), torch.tensor([bad]))
        )


def test_table_looks_up_saves_and_refuses_what_it_lacks(tmp_path: Path) -> None:
    """Rows in the order asked for; bit for bit the same after a round trip; a pair without a reference is an
    error."""
    train = SideLogProbs(torch.tensor([-1.0, -2.0, float("nan")]), torch.tensor([-3.0, -4.1, float("nan")]))
    held_out = SideLogProbs(torch.tensor([-5.0]), torch.tensor([-6.0]))
    ReferenceTable(train, held_out).save(tmp_path / "reference.safetensors")
    table = ReferenceTable.load(tmp_path / "reference.safetensors")
    ref_w, ref_l = table.train_rows([1, 0, 1])
    assert torch.equal(ref_w, torch.tensor([-2.0, -1.0, -2.0]))
    assert torch.equal(ref_l, torch.tensor([-4.1, -3.0, -4.1]))
    assert torch.equal(table.held_out.z_l, held_out.z_l)
    assert table.start(0).reference is table.held_out
    assert table.start(0, own_weights=True).reference is None, "made by an rcpo that kept none"
    table.held_out_reference = SideLogProbs(torch.tensor([-7.0]), torch.tensor([-8.0]))
    table.save(tmp_path / "reference.safetensors")
    own = ReferenceTable.load(tmp_path / "reference.safetensors").start(0, own_weights=True)
    assert own.reference is not None
    assert [side.tolist() for side in own.reference] == [[-7.0], [-8.0]]
    with pytest.raises(RuntimeError, match="no reference log-probs"):
        table.train_rows([0, 2])
    assert [path.name for path in tmp_path.iterdir()] == ["reference.safetensors"]


def test_table_keeps_mismatched_pairs(tmp_path: Path) -> None:
    """By both indices: (0, 1) is not (1, 0). Without them the file is what it was."""
    train, held_out = (SideLogProbs(torch.tensor([-1.0, -2.0]), torch.zeros(2)) for _ in range(2))
    table = ReferenceTable(train, held_out)
    path = tmp_path / "reference.safetensors"
    table.save(path)
    assert set(load_file(path)) == {"train_w", "train_l", "held_out_w", "held_out_l"}
    there, back = Mismatch(0, 1), Mismatch(1, 0)
    table.mismatched = {there: (-0.5, -1.5), back: (-2.5, -3.7)}
    table.save(path)
    read = ReferenceTable.load(path)
    rows = read.mismatched_rows([back, there], make_batch(2))
    assert torch.equal(rows.z_w, torch.tensor([-2.5, -0.5]))
    assert torch.equal(rows.z_l, torch.tensor([-3.7, -1.5]))
    assert read.has([0, 1], False, [there, back])
    assert not read.has([0, 1], False, [Mismatch(1, 1)])
    assert not ReferenceTable(train, held_out).has([0], False, [there])
