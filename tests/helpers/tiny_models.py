"""Tiny random models and batches for all tests: built from transformers' configs, no network, no files."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    set_seed,
)

from rcpo.data.batch import PairBatch, collate
from rcpo.data.tokenize import TokenizedPair, TokenizedSide

VOCABULARY = 37
"""Of every tiny model: a prime, so that no chunk size or rank count divides it."""
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""Of configs of nearly any family."""
HIDDEN = 16


def make_llama(*, tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of 2 layers in fp32; weights large enough for log-probs that differ between tokens."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make_neox(*, tied: bool = False, seed: int = 0) -> GPTNeoXForCausalLM:
    """A random GPT-NeoX of 2 layers in fp32."""
    set_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_dropout=0.0, attention_dropout=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def make_mixtral(*, seed: int = 0) -> MixtralForCausalLM:
    """A random mixture of 4 experts, of which 2 take a token, of 2 layers in fp32. Not among `MODELS`, since
    experts change the shape of what is compared."""
    set_seed(seed)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
        num_local_experts=4, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    return MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: make_llama(),
    "llama-tied": lambda: make_llama(tied=True),
    "neox": lambda: make_neox(),
    "neox-tied": lambda: make_neox(tied=True),
}


def make_pairs(num_pairs: int, *, seed: int = 0, longest: int = 7) -> list[TokenizedPair]:
    """Random pairs of ragged lengths: prompts of 1 to 4 tokens, responses of 1 to `longest`."""
    draw = random.Random(seed)

    def side(prompt: Sequence[int]) -> TokenizedSide:
        response = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))]
        return TokenizedSide([*prompt, *response], len(prompt))

    pairs = []
    for row in range(num_pairs):
        prompt = [1, *(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(0, 3)))]
        pairs.append(TokenizedPair(side(prompt), side(prompt), row))
    return pairs


def make_batch(num_pairs: int, *, seed: int = 0, pad_id: int = 0) -> PairBatch:
    return collate(make_pairs(num_pairs, seed=seed), pad_id)
