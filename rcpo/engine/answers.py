"""Answers of a policy under training: of each token the likeliest, by transformers' own `generate`.

Without what a model's generation_config asks for (penalties, forced tokens): two answers to one prompt differ
by weights alone. One prompt at a time, so that no answer depends on its neighbours. At ZeRO 3 every rank
writes the same answers together: each forward pass gathers its weights layer by layer, as in training.
Called by `rcpo.training.answers`.
"""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from rcpo.engine.engine import Engine


def greedy_answers(
    engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int, end_ids: Sequence[int], pad_id: int
) -> list[list[int]]:
    """The ids of each prompt's answer, with the token of `end_ids` that ends it, at most `num_tokens`.
    Collective at ZeRO 3; draws no random number."""
    greedy = GenerationConfig(
        max_new_tokens=num_tokens,
        use_cache=True,
        eos_token_id=list(end_ids) or None,
        pad_token_id=pad_id,
    )
    answers = []
    with engine.evaluating() as model, torch.no_grad():
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            for prompt in prompts:
                ids = torch.tensor([prompt], device=engine.device)
                whole = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
                answers.append(whole[0, len(prompt) :].tolist())
        finally:
            model.generation_config = own
    return answers
