"""Parts of a reference pass: what a killed one leaves, and that going on from it changes no bit."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import make_llama, make_pairs
from rcpo.data.pairs import SideLogProbs, TokenizedPair
from rcpo.models.policy import Policy
from rcpo.reference import parts
from rcpo.reference.cache import ReferenceCache, pair_keys, shared_reference
from rcpo.reference.parts import ByLength, Parts, known_of, run_passes

PAIRS = make_pairs(13, seed=5)


class Killed(BaseException):
    pass


class Counted(ByLength):
    """The passes of a tiny model, which end with `killed` before one too many; remembers those done."""

    class Model:
        device = torch.device("cpu")

        def __init__(self) -> None:
            self._policy = Policy(make_llama()).eval()

        @torch.no_grad()
        def logprobs_without_grad(self, batch: Any, tokens: bool = False) -> Tensor:
            z: Tensor = self._policy(batch, tokens)
            return z

    def __init__(self, pairs: Sequence[TokenizedPair], most: int) -> None:
        super().__init__(self.Model(), pairs, 0, 2)
        self.done: list[int] = []
        self._most = most

    def z(self, number: int) -> Tensor:
        if len(self.done) >= self._most:
            raise Killed
        self.done.append(number)
        return super().z(number)


def on_ranks(num_ranks: int, work: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`work` by threads that are the ranks of `rcpo.reference.parts`; where one is killed, all end."""
    here, meeting = threading.local(), threading.Barrier(num_ranks)
    said: list[Any] = [None] * num_ranks

    def gather(value: Any) -> list[Any]:
        said[here.rank] = value
        meeting.wait(20)
        of_all = list(said)
        meeting.wait(20)
        return of_all

    def one(rank: int) -> None:
        here.rank = rank
        try:
            work(rank)
        except (Killed, threading.BrokenBarrierError):
            meeting.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(num_ranks)]
    with monkeypatch.context() as patched:
        patched.setattr(parts, "rank", lambda: here.rank)
        patched.setattr(parts, "world_size", lambda: num_ranks)
        patched.setattr(parts, "gather", gather)
        patched.setattr(parts, "from_rank_zero", lambda value: gather(value)[0])
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def scored(
    num_ranks: int, monkeypatch: pytest.MonkeyPatch, most: int = 99
) -> tuple[list[SideLogProbs], list[list[int]], int]:
    """z of PAIRS on every rank, which passes each rank has run, and how many pairs were there. Rank 0 is
    killed after `most` passes."""
    values: list[SideLogProbs] = []
    ran = [Counted(PAIRS, most if rank == 0 else 99) for rank in range(num_ranks)]
    num_known: list[int] = []
    keys = [pair_keys(pair) for pair in PAIRS]

    def work(rank: int) -> None:
        own = Parts(ReferenceCache("f")) if rank == 0 else None
        known = known_of(ran[rank], own)
        num_known.append(len(known))
        values.append(run_passes(ran[rank], keys, known, own, lambda num_pairs: None))

    on_ranks(num_ranks, work, monkeypatch)
    return values, [each.done for each in ran], num_known[0]


def num_parts() -> int:
    return len(list(Parts(ReferenceCache("f")).folder.glob("*")))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 2), (1, 3), (2, 1)])
def test_a_killed_pass_goes_on_bit_for_bit(first: int, second: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 batches of 13 pairs. Killed after 2 rounds on so many ranks, then on as many or others: what was kept
    is not run again, and z is that of one uninterrupted pass on one rank."""
    whole, ran, _ = scored(1, monkeypatch)
    assert ran == [list(range(7))]
    assert num_parts() == 0  # less than a minute
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    none, _, _ = scored(first, monkeypatch, most=2)
    assert (none, num_parts()) == ([], 2)
    kept = set(range(2 * first))
    values, ran, num_known = scored(second, monkeypatch)
    run_again = {number for each in ran for number in each}
    assert len(values) == second
    for each in values:
        assert torch.equal(torch.stack([*each]), torch.stack([*whole[0]]))
    assert num_known > 0
    assert not run_again & kept
    assert run_again | kept == set(range(7))


def test_a_damaged_part_is_made_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit of z: the part goes, by its hash, with a warning; nothing of it is used."""
    whole, *_ = scored(1, monkeypatch)
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    scored(1, monkeypatch, most=3)
    file = sorted(Parts(ReferenceCache("f")).folder.glob("*"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    values, (ran,), num_known = scored(1, monkeypatch)
    assert f"{file} is damaged (it is not what was written)" in caplog.text
    assert not file.exists() or file.read_bytes() != content
    assert (len(ran), num_known) == (5, 4)
    assert torch.equal(torch.stack([*values[0]]), torch.stack([*whole[0]]))


def test_parts_go_when_the_entry_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not before: those of another pass that was killed stay, as long as the entry lacks one of their
    rows."""
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    scored(1, monkeypatch, most=3)
    cache = ReferenceCache("f")
    own = Parts(cache)
    assert num_parts() == 3
    own.remove_known()
    assert num_parts() == 3
    passes = Counted(PAIRS, 99)
    some = [idx for members in passes.members[:2] for idx in members]

    def compute(missing: Sequence[TokenizedPair]) -> SideLogProbs:
        again = Counted(missing, 99)
        keys = [pair_keys(pair) for pair in missing]
        return run_passes(again, keys, known_of(again, own), own, lambda num_pairs: None)

    shared_reference(cache, [PAIRS[idx] for idx in some], compute)
    own.remove_known()
    assert num_parts() == 1
    shared_reference(cache, PAIRS, compute)
    own.remove_known()
    assert not own.folder.exists()


def test_a_part_that_cannot_be_written_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands where the folder should be."""
    own = Parts(ReferenceCache("f"))
    own.folder.parent.mkdir(parents=True)
    own.folder.write_text("")
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    values, (ran,), _ = scored(1, monkeypatch)
    assert len(values[0].z_w) == 13
    assert len(ran) == 7
    assert "cannot be written" in caplog.text


def test_what_is_not_finite_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Parts(ReferenceCache("f"))
    rows = [parts.Row(b"k" * 16, b"p" * 16, float("nan")), parts.Row(b"l" * 16, b"q" * 16, -1.5)]
    own.add(rows)
    assert own.read() == {b"q" * 16: -1.5}
    own.add(rows[:1])
    assert num_parts() == 1


def test_how_often_a_part_is_asked_for() -> None:
    """Rounds double until an eighth of a minute is between two questions."""
    assert parts._due(1.0, 1) == (False, 2)
    assert parts._due(7.4, 4) == (False, 8)
    assert parts._due(8.0, 8) == (False, 8)
    assert parts._due(60.0, 8) == (True, 8)
