"""Joint layouts, train.share_prefix and train.packing: the same z and the same gradient as two padded rows a
pair."""

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from helpers.tiny_models import MODELS, make_llama, make_pairs
from rcpo.common.errors import UserError
from rcpo.data.batch import collate
from rcpo.data.joint import collate_joint, shared_prefix
from rcpo.data.tokenize import TokenizedPair, TokenizedSide
from rcpo.method.scores import HeadScores
from rcpo.models.attention import refuse_joint_layout
from rcpo.models.policy import Policy

LAYOUTS = [(True, False), (False, True), (True, True)]
"""(share_prefix, packing)."""


def uneven_pairs() -> list[TokenizedPair]:
    """Prompts in common, prompts cut differently, and prompts with nothing in common."""
    odd = [
        TokenizedPair(TokenizedSide([1, 5, 6, 7, 8], 3), TokenizedSide([1, 5, 9, 7], 3), 10),
        TokenizedPair(TokenizedSide([5, 6, 7, 8], 2), TokenizedSide([6, 7, 4], 1), 11),
        TokenizedPair(TokenizedSide([1, 5, 6, 7], 2), TokenizedSide([1, 5, 3, 8, 4], 4), 12),
    ]
    return [*make_pairs(5, seed=3), *odd]


def test_layout_of_one_pair() -> None:
    """Prompt 1 5, chosen 6 7, rejected 8: one row 1 5 6 7 8; both first tokens are predicted at the prompt's
    end, place 1, and 7 at place 2; the rejected token is at position 2 again."""
    pair = TokenizedPair(TokenizedSide([1, 5, 6, 7], 2), TokenizedSide([1, 5, 8], 2), 0)
    batch = collate_joint([pair], 0, share_prefix=True, packing=False)
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8]]
    assert batch.token_positions.tolist() == [1, 2, 1]
    assert batch.targets.tolist() == [6, 7, 8]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.segments is not None
    assert batch.segments.pair.tolist() == [[0, 0, 0, 0, 0]]
    assert batch.segments.part.tolist() == [[0, 0, 1, 1, 2]]
    assert (batch.lengths.tolist(), batch.num_chosen_tokens, batch.num_pairs) == ([2, 1], 2, 1)


def test_a_packed_batch_has_no_padding() -> None:
    """Two pairs, prefixes shared: rows 1 5 6 7 8 and 1 9 4 3 behind one another, positions and segments
    anew."""
    pairs = [
        TokenizedPair(TokenizedSide([1, 5, 6, 7], 2), TokenizedSide([1, 5, 8], 2), 0),
        TokenizedPair(TokenizedSide([1, 9, 4], 2), TokenizedSide([1, 9, 3], 2), 1),
    ]
    batch = collate_joint(pairs, 0, share_prefix=True, packing=True)
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8, 1, 9, 4, 3]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 2, 2]]
    assert batch.segments is not None
    assert batch.segments.pair.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch.segments.part.tolist() == [[0, 0, 1, 1, 2, 0, 0, 1, 2]]
    assert batch.token_positions.tolist() == [1, 2, 6, 1, 6]
    assert batch.targets.tolist() == [6, 7, 4, 8, 3]
    unshared = collate_joint(pairs, 0, share_prefix=False, packing=True)
    assert unshared.input_ids.tolist() == [[1, 5, 6, 7, 1, 5, 8, 1, 9, 4, 1, 9, 3]]
    assert unshared.position_ids is not None
    assert unshared.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 1, 2]]


def test_the_prefix_ends_where_the_prompts_differ_or_one_of_them_ends() -> None:
    """A response that repeats the other one is not shared: both are scored."""
    assert [shared_prefix(pair) for pair in uneven_pairs()[5:]] == [2, 0, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_z_and_gradient_are_those_of_two_rows_a_pair(
    name: str, attention: str, layout: tuple[bool, bool]
) -> None:
    """To fp32 rounding, for random weights of the sides."""
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    policy, pairs = Policy(model), uneven_pairs()
    weights = torch.randn(2 * len(pairs), generator=torch.Generator().manual_seed(0))
    found = []
    for batch in (collate(pairs, 0), collate_joint(pairs, 0, *layout)):
        z = policy(batch)
        found.append((z.detach(), torch.autograd.grad((weights * z).sum(), list(policy.parameters()))))
    (z, gradients), (shared_z, shared_gradients) = found
    torch.testing.assert_close(shared_z, z, atol=2e-5, rtol=1e-5)
    for gradient, shared in zip(gradients, shared_gradients, strict=True):
        torch.testing.assert_close(shared, gradient, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_head_scores_are_those_of_two_rows_a_pair(layout: tuple[bool, bool]) -> None:
    pairs, products = uneven_pairs(), []
    for batch in (collate(pairs, 0), collate_joint(pairs, 0, *layout)):
        policy = Policy(make_llama())
        policy.head.scores = HeadScores(37, 16, False, torch.device("cpu"))
        policy(batch).sum().backward()
        products.append(policy.head.scores.sides(1.0, 1.0).partial_products())
    torch.testing.assert_close(products[1], products[0], rtol=1e-5, atol=1e-8)


def test_a_model_that_cannot_is_refused_by_name() -> None:
    """Mistral with a window; a kernel without masks."""
    config = MistralConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8, attn_implementation="sdpa",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"MistralForCausalLM cannot compute a prompt once .* within windows"):
        refuse_joint_layout(MistralForCausalLM(config), True)
    model = make_llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"flash_attention_2 takes no mask; type model\.attention=sdpa"):
        refuse_joint_layout(model, True)
    refuse_joint_layout(model, False)  # packed sequences it takes by their positions
    refuse_joint_layout(make_llama(), True)
