"""Answers depend on their prompt and seed alone: not on what they are batched with, nor in which order."""

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, set_seed

from helpers.tiny_models import MODELS, VOCABULARY
from rcpo.config.schema import ModelConfig
from rcpo.evaluation.decoding import Answer, Asked, Decoding, Draws, answer_all
from rcpo.models.attention import UNREAD_SDPA
from rcpo.models.load import load_frozen_model


def make_gpt2() -> PreTrainedModel:
    """Its positions are learnt one by one: a row that were shifted by padding would read others."""
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5
        )
    )


KINDS: dict[str, Callable[[], PreTrainedModel]] = {"llama": MODELS["llama"], "gpt2": make_gpt2}


def prompts(num: int, vocabulary: int = VOCABULARY) -> list[Asked]:
    draw = random.Random(0)
    return [
        Asked([draw.randrange(4, vocabulary) for _ in range(draw.randint(1, 12))], f"seed {idx}")
        for idx in range(num)
    ]


def answers(model: PreTrainedModel, asked: list[Asked], decoding: Decoding, stops: list[int]) -> list[Answer]:
    found: dict[int, Answer] = {}
    for batch in answer_all(model.eval(), asked, decoding, stops, pad_id=0):
        found |= batch
    return [found[place] for place in range(len(asked))]


def plainly(model: PreTrainedModel, ids: list[int], num_new: int, stops: list[int]) -> Answer:
    """Greedy without cache, batch or padding."""
    ids, num_prompt = list(ids), len(ids)
    while len(ids) < num_prompt + num_new:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            return Answer(ids[num_prompt:], True)
        ids.append(token)
    return Answer(ids[num_prompt:], False)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_that_of_the_prompt_alone(kind: str) -> None:
    model, asked, stops = KINDS[kind]().eval(), prompts(9), [2, 3]
    expected = [plainly(model, each.ids, 8, stops) for each in asked]
    assert len({tuple(answer.ids) for answer in expected}) > 4
    for size in (1, 4, 9):
        assert answers(model, asked, Decoding(max_new_tokens=8, answers_per_batch=size), stops) == expected


def test_the_model_that_ships_sees_its_masks() -> None:
    """rcpo lets attention leave masks unread where it pads on the right; here rows are padded on the left."""
    model = load_frozen_model(ModelConfig(path="builtin:tiny", dtype="float32"))
    assert model.config._attn_implementation == UNREAD_SDPA
    asked = prompts(6, vocabulary=40)
    together = answers(model, asked, Decoding(max_new_tokens=6), [3])
    assert together == [plainly(model, each.ids, 6, [3]) for each in asked]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_draws_are_those_of_their_seed_in_any_order_and_batch(top_p: float) -> None:
    model, asked = KINDS["llama"](), prompts(6)
    drawn = [
        answers(model, order, Decoding(0.9, top_p, 6, size), [2])
        for order, size in ((asked, 1), (asked, 4), (asked[::-1], 3))
    ]
    assert drawn[0] == drawn[1] == drawn[2][::-1]
    others = [each._replace(seed=f"other {each.seed}") for each in asked]
    assert answers(model, others, Decoding(0.9, top_p, 6), [2]) != drawn[0]


def test_draws_have_the_models_probabilities() -> None:
    """p = (.5, .3, .2) at temperature 1; with top_p .7 the third is never drawn, and the others have 5/8,
    3/8. Of 4,000 draws four standard errors are .032."""
    logits = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.2), -math.inf]])
    for top_p, expected in ((1.0, (0.5, 0.3, 0.2, 0.0)), (0.7, (0.625, 0.375, 0.0, 0.0))):
        draw = Draws([f"{idx}" for idx in range(4000)], 1.0, top_p)
        left = draw(torch.zeros(4000, 1, dtype=torch.long), logits.expand(4000, -1))
        counts = Counter(left.argmax(-1).tolist())
        assert all((row == 0).sum() == 1 for row in left[:5])
        for token, share in enumerate(expected):
            assert counts[token] / 4000 == pytest.approx(share, abs=0.032 if share else 0)


def test_temperature_sharpens() -> None:
    """At temperature .5 probabilities are squared: .5 against .3 becomes 25 to 9."""
    logits = torch.tensor([[math.log(0.5), math.log(0.3)]]).expand(4000, -1)
    left = Draws([f"{idx}" for idx in range(4000)], 0.5, 1.0)(torch.zeros(4000, 1, dtype=torch.long), logits)
    assert (left.argmax(-1) == 0).float().mean().item() == pytest.approx(25 / 34, abs=0.03)


def test_an_answer_is_cut_where_positions_end() -> None:
    """GPT-2 here has 32: a prompt of 30 leaves two tokens, one of 32 none; the one beside them has its
    own."""
    model = KINDS["gpt2"]()
    asked = [Asked([5] * 30, ""), Asked([5] * 32, ""), Asked([5, 6], "")]
    long, full, short = answers(model, asked, Decoding(max_new_tokens=8), [])
    assert (len(long.ids), full, len(short.ids)) == (2, Answer([], False), 8)
