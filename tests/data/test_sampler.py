"""The stream of pairs: every pass complete, independent of how a batch is cut, a function of seed and
step alone."""

import pytest

from rcpo.data.mismatched import Mismatch
from rcpo.data.sampler import PairSampler, dealt


def stream(sampler: PairSampler, num_steps: int) -> list[int]:
    return [idx for step in range(num_steps) for idx in sampler.global_batch(step)]


@pytest.mark.parametrize(("num_pairs", "pairs_per_step"), [(12, 4), (10, 4), (7, 7), (5, 3), (1, 1)])
def test_every_pass_visits_each_pair_once(num_pairs: int, pairs_per_step: int) -> None:
    """Four passes; batches straddle their ends where the sizes do not divide. Passes differ in order."""
    sampler = PairSampler(num_pairs, pairs_per_step, seed=3)
    seen = stream(sampler, -(-4 * num_pairs // pairs_per_step))
    passes = [seen[start : start + num_pairs] for start in range(0, 4 * num_pairs, num_pairs)]
    for order in passes:
        assert sorted(order) == list(range(num_pairs))
    if num_pairs >= 5:
        assert len({tuple(order) for order in passes}) == 4


@pytest.mark.parametrize(
    ("world_size", "pairs_per_device"),
    [(1, 8), (1, 1), (1, 4), (2, 4), (2, 1), (4, 2), (8, 1)],
)
def test_micro_batches_make_up_the_global_batch(world_size: int, pairs_per_device: int) -> None:
    """Each of pairs_per_device pairs, each pair once; step 2 straddles two passes over 20 pairs."""
    sampler = PairSampler(20, 8, seed=1)
    for step in range(4):
        cut = [
            micro
            for rank in range(world_size)
            for micro in PairSampler(20, 8, seed=1).micro_batches(step, rank, world_size, pairs_per_device)
        ]
        assert {len(micro) for micro in cut} == {pairs_per_device}
        assert sorted(idx for micro in cut for idx in micro) == sorted(sampler.global_batch(step))


def test_pairs_of_similar_length_share_a_micro_batch_and_ranks_have_as_much_to_do() -> None:
    """Widths 10, 20, ..., 80 in some order, 2 ranks, micro-batches of 2: {10, 20} and {30, 40} first, then
    {50, 60} and {70, 80}; the global batch is what it is without widths."""
    widths = [40, 10, 80, 30, 60, 20, 70, 50]
    sampler = PairSampler(8, 8, seed=3, widths=widths)
    cut = [
        [[widths[idx] for idx in micro] for micro in sampler.micro_batches(0, rank, 2, 2)] for rank in (0, 1)
    ]
    assert cut == [[[10, 20], [50, 60]], [[30, 40], [70, 80]]]
    assert sampler.global_batch(0) == PairSampler(8, 8, seed=3).global_batch(0)


def test_every_prompt_meets_the_responses_of_the_next_pair_of_its_batch() -> None:
    """Step 2 straddles two passes over 20 pairs; the last prompt meets the first pair. Lengths, ranks and
    micro-batches have no say."""
    sampler = PairSampler(20, 8, seed=1, widths=list(range(20, 0, -1)))
    for step in range(4):
        batch = sampler.global_batch(step)
        mismatches = sampler.mismatches(step)
        assert [each.prompt_of for each in mismatches] == batch
        assert [each.responses_of for each in mismatches] == [*batch[1:], batch[0]]
        assert PairSampler(20, 8, seed=1).mismatches(step) == mismatches
    two = PairSampler(20, 2, seed=1)
    first, second = two.global_batch(0)
    assert two.mismatches(0) == [Mismatch(first, second), Mismatch(second, first)]
    everything = sampler.all_mismatches(4)
    assert len(set(everything)) == len(everything)
    assert set(everything) == {each for step in range(4) for each in sampler.mismatches(step)}


@pytest.mark.parametrize(("world_size", "per_device"), [(1, 8), (2, 1), (2, 4), (4, 2)])
def test_dealt_out_every_item_is_there_once(world_size: int, per_device: int) -> None:
    items, widths = list("abcdefgh"), [40, 10, 80, 30, 60, 20, 70, 50]
    cut = [list(dealt(items, widths, rank, world_size, per_device)) for rank in range(world_size)]
    assert sorted(item for of_rank in cut for micro in of_rank for item in micro) == items
    assert {len(of_rank) for of_rank in cut} == {8 // world_size // per_device}
    if (world_size, per_device) == (2, 1):
        assert cut == [[["b"], ["d"], ["h"], ["g"]], [["f"], ["a"], ["e"], ["c"]]]


def test_a_resumed_run_sees_what_the_whole_run_saw() -> None:
    """Any step asked for first, and steps asked for backwards, as after a restart."""
    whole = [PairSampler(10, 4, seed=5).global_batch(step) for step in range(20)]
    sampler = PairSampler(10, 4, seed=5)
    assert [sampler.global_batch(step) for step in reversed(range(20))] == whole[::-1]
    assert stream(sampler, 20) == [idx for batch in whole for idx in batch]


def test_the_seed_fixes_the_order() -> None:
    assert stream(PairSampler(50, 5, seed=0), 30) == stream(PairSampler(50, 5, seed=0), 30)
    assert stream(PairSampler(50, 5, seed=0), 10) != stream(PairSampler(50, 5, seed=1), 10)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 9])
def test_visited_pairs_are_those_of_the_first_steps(num_steps: int) -> None:
    """10 pairs in batches of 4: 0, 4, 8, then all 10."""
    sampler = PairSampler(10, 4, seed=2)
    assert sampler.visited(num_steps) == sorted(set(stream(sampler, num_steps)))
    assert len(sampler.visited(num_steps)) == min(4 * num_steps, 10)


def test_steps_and_epochs_by_hand() -> None:
    """10 pairs, 4 a step: one epoch takes 2.5 steps, so 3; half of one 1.25, so 2; 2 epochs exactly 5."""
    sampler = PairSampler(10, 4, seed=0)
    assert [sampler.steps_of(epochs) for epochs in (1, 0.5, 2, 0.01)] == [3, 2, 5, 1]
    assert [sampler.epoch(num_steps) for num_steps in (0, 5, 10)] == [0.0, 2.0, 4.0]
    # 1.1 * 100 / 2 is 55.00000000000001 in floating point, and must not become 56 steps.
    assert PairSampler(100, 2, seed=0).steps_of(1.1) == 55
