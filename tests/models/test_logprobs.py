"""Token log-probs in chunks against plain log_softmax over full logits, and z against padding and
batching."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import rcpo.models.logprobs
from helpers.tiny_models import HIDDEN, VOCABULARY, make_batch, make_pairs
from rcpo.data.batch import PairBatch, collate
from rcpo.method.scores import HeadScores
from rcpo.models.logprobs import HeadSizes, TokenLogProbHead, head_sizes, logit_bytes, sum_per_side
from rcpo.models.policy import Policy


@pytest.fixture(params=[16, 24, 10**6])
def chunk_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tokens a chunk: the least that rcpo uses, one that divides nothing, and everything at once."""
    monkeypatch.setattr(rcpo.models.logprobs, "CHUNK_ELEMENTS", request.param * VOCABULARY)
    return int(request.param)


def plain_token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: PairBatch) -> Tensor:
    """(N,) token log-probs by definition: all logits, log_softmax, gather."""
    logits = nn.functional.linear(hidden, weight, bias).flatten(0, 1)
    return logits.log_softmax(-1)[batch.token_positions, batch.targets]


def plain_z(model: PreTrainedModel, batch: PairBatch) -> Tensor:
    """(2B,) by the model's own forward pass with an attention mask, each row's response summed in a loop."""
    real = torch.zeros_like(batch.input_ids)
    for row, last in enumerate(batch.response_mask.int().cumsum(1).argmax(1)):
        real[row, : last + 1] = 1
    logps = model(input_ids=batch.input_ids, attention_mask=real).logits.log_softmax(-1)
    rows = []
    for row in range(len(batch.input_ids)):
        places = batch.response_mask[row].nonzero().squeeze(1)
        rows.append(sum(logps[row, place - 1, batch.input_ids[row, place]] for place in places))
    return torch.stack(rows)


@pytest.mark.parametrize("has_bias", [False, True])
def test_head_agrees_with_log_softmax(has_bias: bool, chunk_tokens: int) -> None:
    """Values and gradients with respect to hidden, weight and bias, with a different gradient for every
    token."""
    batch = make_batch(9, seed=3)
    assert len(batch.targets) > 2 * 24
    projection = nn.Linear(HIDDEN, VOCABULARY, bias=has_bias)
    hidden = torch.randn(*batch.input_ids.shape, HIDDEN, requires_grad=True)
    leaves = [hidden, *projection.parameters()]
    logps = TokenLogProbHead(projection)(hidden, batch)
    expected = plain_token_logps(hidden, projection.weight, projection.bias, batch)
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(len(logps))
    for ours, plain in zip(
        torch.autograd.grad(logps, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_head_in_bf16_is_within_a_hundredth(chunk_tokens: int) -> None:
    """bf16 hidden and weight: log-probs are fp32 and within 1e-2 of fp32 arithmetic on the same numbers; so
    are the gradients, relative to their norm."""
    batch = make_batch(9, seed=3)
    projection = nn.Linear(HIDDEN, VOCABULARY, bias=False).bfloat16()
    hidden = torch.randn(*batch.input_ids.shape, HIDDEN).bfloat16().requires_grad_()
    logps = TokenLogProbHead(projection)(hidden, batch)
    exact_hidden = hidden.detach().float().requires_grad_()
    exact_weight = projection.weight.detach().float().requires_grad_()
    expected = plain_token_logps(exact_hidden, exact_weight, None, batch)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(len(logps))
    ours = torch.autograd.grad(logps, [hidden, projection.weight], upstream)
    exact = torch.autograd.grad(expected, [exact_hidden, exact_weight], upstream)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - theirs).norm() < 1e-2 * theirs.norm()


def test_head_is_finite_where_logits_are_huge() -> None:
    """Logits of +-1e4: log-probs near 0 and -2e4, gradients finite; exp of a raw logit would overflow."""
    batch = make_batch(2)
    projection = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    nn.init.zeros_(projection.weight)
    projection.weight.data[0], projection.weight.data[5] = 1e4 / HIDDEN, -1e4 / HIDDEN
    hidden = torch.ones(*batch.input_ids.shape, HIDDEN, requires_grad=True)
    logps = TokenLogProbHead(projection)(hidden, batch._replace(targets=batch.targets.clamp(max=0)))
    torch.testing.assert_close(logps, torch.zeros_like(logps))
    logps = TokenLogProbHead(projection)(hidden, batch._replace(targets=torch.full_like(batch.targets, 5)))
    torch.testing.assert_close(logps, torch.full_like(logps, -2e4))
    logps.sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(projection.weight.grad).all()


def test_chunks_cover_all_tokens_and_keep_the_sides_apart() -> None:
    """40 chosen and 20 rejected tokens in chunks of 16: 16, 16, 8 | 16, 4. With 32-token chunks: 32, 8 |
    20."""
    bounds = [(part.start, part.stop) for part in rcpo.models.logprobs._chunks(60, 40, 16)]
    assert bounds == [(0, 16), (16, 32), (32, 40), (40, 56), (56, 60)]
    bounds = [(part.start, part.stop) for part in rcpo.models.logprobs._chunks(60, 40, 32)]
    assert bounds == [(0, 32), (32, 40), (40, 60)]


@pytest.mark.parametrize(
    ("vocabulary", "on_cpu"),
    [(37, 453438), (32000, 524), (50304, 333), (128256, 130), (151936, 110), (2**21, 16)],
)
def test_sizes_of_chunks(vocabulary: int, on_cpu: int) -> None:
    """On a CPU 2^24 logits and at least 16 tokens, 2^25 fp32 values kept; on a GPU 2,048 tokens, a multiple
    of 256, and 2 GB in 16 bits, whatever the vocabulary."""
    assert head_sizes("cpu", vocabulary) == HeadSizes(on_cpu, 2**27, keeps_rounded=False)
    assert head_sizes("cuda", vocabulary) == HeadSizes(2048, 2 * 10**9, keeps_rounded=True)
    assert head_sizes("cuda", vocabulary).chunk_tokens % 256 == 0


def test_bytes_of_logits_by_hand() -> None:
    """1,000 words. 10 tokens in fp32: 40,000 bytes, all kept. 10,000 on a CPU in chunks of 100 with 1 MB
    kept: 400 kB + 1 MB. On a GPU in bf16 with chunks of 2,048: a chunk in fp32 and in bf16, 12.288 MB, and
    20 MB kept; of 2 million tokens 2 GB kept."""
    on_cpu = HeadSizes(100, 10**6, keeps_rounded=False)
    assert logit_bytes(on_cpu, 1000, 10, 4) == 40_000
    assert logit_bytes(on_cpu, 1000, 10_000, 2) == 1_400_000
    on_cuda = head_sizes("cuda", 1000)
    assert logit_bytes(on_cuda, 1000, 10_000, 2) == 12_288_000 + 20_000_000
    assert logit_bytes(on_cuda, 1000, 2_000_000, 2) == 12_288_000 + 2_000_000_000


def test_what_is_kept_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 tokens in bf16, of which two and no third fit into what may be kept."""
    batch = make_batch(9, seed=3)
    num_chunks = len(rcpo.models.logprobs._chunks(len(batch.targets), batch.num_chosen_tokens, 32))
    calls, compute = [], rcpo.models.logprobs._logits
    monkeypatch.setattr(rcpo.models.logprobs, "_logits", lambda *args: calls.append(1) or compute(*args))
    head = TokenLogProbHead(nn.Linear(HIDDEN, VOCABULARY, bias=False).bfloat16())
    assert num_chunks >= 3
    for kept, again in ((0, num_chunks), (65 * 2 * VOCABULARY, num_chunks - 2), (10**6, 0)):
        head.sizes = HeadSizes(32, kept, keeps_rounded=True)
        calls.clear()
        hidden = torch.randn(*batch.input_ids.shape, HIDDEN).bfloat16().requires_grad_()
        head(hidden, batch).sum().backward()
        assert len(calls) == num_chunks + again


@pytest.mark.parametrize("kept_bytes", [0, 60 * 2 * VOCABULARY, 10**6], ids=["none kept", "some", "all"])
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_gpus_way_of_dividing_the_head_gives_the_same(
    has_bias: bool, in_forward: bool, kept_bytes: int
) -> None:
    """In bf16 with errors kept in bf16, 32 tokens a chunk, against all computed again: log-probs to the bit,
    gradients and sums of scores to 1e-4 of their norms, of a bias to 1e-2. In fp32, where nothing is
    rounded, to 1e-6."""
    batch = make_batch(9, seed=3)
    for dtype, tolerance in ((torch.bfloat16, 1e-4), (torch.float32, 1e-6)):
        torch.manual_seed(2)
        projection = nn.Linear(HIDDEN, VOCABULARY, bias=has_bias).to(dtype)
        hidden = torch.randn(*batch.input_ids.shape, HIDDEN).to(dtype).requires_grad_()
        upstream = torch.randn(len(batch.targets))
        made = []
        for sizes in (HeadSizes(32, 0, keeps_rounded=False), HeadSizes(32, kept_bytes, keeps_rounded=True)):
            head = TokenLogProbHead(projection)
            head.sizes = sizes
            head.scores = HeadScores(VOCABULARY, HIDDEN, has_bias, torch.device("cpu"), in_forward=in_forward)
            logps = head(hidden, batch)
            gradients = torch.autograd.grad(logps, [hidden, *projection.parameters()], upstream)
            made.append((logps, [*gradients, *head.scores.own_sums()]))
        (logps, ours), (others_logps, others) = made
        assert torch.equal(logps, others_logps)
        for mine, theirs in zip(ours, others, strict=True):
            bound = max(tolerance, 1e-2 if mine.shape == (VOCABULARY,) and dtype == torch.bfloat16 else 0)
            assert (mine.float() - theirs.float()).norm() <= bound * mine.float().norm()


def test_sum_per_side_by_hand() -> None:
    """Row 0 predicts its response at places 1 and 2, row 1 at place 0: z = (-1 - 2, -4)."""
    batch = PairBatch(
        input_ids=torch.tensor([[1, 5, 6, 7], [1, 8, 0, 0]]),
        token_positions=torch.tensor([1, 2, 4]),
        targets=torch.tensor([6, 7, 8]),
        lengths=torch.tensor([2, 1]),
        num_chosen_tokens=2,
    )
    assert sum_per_side(torch.tensor([-1.0, -2.0, -4.0]), batch).tolist() == [-3.0, -4.0]


def test_policy_agrees_with_the_models_own_logits(tiny_model: PreTrainedModel, chunk_tokens: int) -> None:
    """z and d sum(c z) / d theta for every parameter, tied or not, against full logits with an attention
    mask."""
    batch = make_batch(5, seed=1)
    z, expected = Policy(tiny_model)(batch), plain_z(tiny_model, batch)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-5)
    weights = torch.randn(len(z))
    names, parameters = zip(*tiny_model.named_parameters(), strict=True)
    ours = torch.autograd.grad(z @ weights, parameters)
    plain = torch.autograd.grad(expected @ weights, parameters)
    for name, mine, theirs in zip(names, ours, plain, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm() + 1e-5, name


def test_padding_and_batching_never_change_a_pair(tiny_model: PreTrainedModel) -> None:
    """Invariant 10: each pair alone = all together = reversed = padded with another id to a greater width."""
    policy = Policy(tiny_model)
    pairs = make_pairs(6, seed=2)
    with torch.no_grad():
        together = policy(collate(pairs, 0)).view(2, -1)
        alone = torch.stack([policy(collate([pair], 0)) for pair in pairs], dim=1)
        backwards = policy(collate(pairs[::-1], 0)).view(2, -1).flip(1)
        wider = policy(collate([*pairs, *make_pairs(2, seed=9, longest=30)], 11)).view(2, -1)[:, :6]
    for other in (alone, backwards, wider):
        torch.testing.assert_close(other, together, atol=2e-5, rtol=1e-6)


def test_collate_by_hand() -> None:
    """Prompt 1 3, chosen 4 5, rejected 6: places 1 and 2 predict 4 and 5 in row 0, place 3 + 1 predicts 6 in
    row 1."""
    from rcpo.data.tokenize import TokenizedPair, TokenizedSide

    batch = collate([TokenizedPair(TokenizedSide([1, 3, 4, 5], 2), TokenizedSide([1, 3, 6], 2), 0)], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 3, 4, 5], [1, 3, 6, 9]]
    assert batch.token_positions.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [4, 5, 6]
    assert batch.lengths.tolist() == [2, 1]
    assert (batch.num_pairs, batch.num_chosen_tokens) == (1, 2)
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
