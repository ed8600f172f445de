"""Where inference begins and ends: what a tokenizer writes in front of a text, and which tokens stop a model.

Owns what of a model's files and config bears on that. The tokenizer carries it, so that whoever has the
tokenizer has it too. Does not read files: `rcpo.models.load` does, and calls `set_generation`.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generation:
    """What a tokenizer does not know of the model that it belongs to."""

    end_ids: tuple[int, ...] = ()
    """Tokens that end generation beside the tokenizer's EOS."""
    response: Literal["template", "verbatim"] = "template"
    """`model.response`: what is written behind a generation prompt."""


def set_generation(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> None:
    tokenizer.rcpo_generation = generation


def generation_of(tokenizer: PreTrainedTokenizerBase) -> Generation:
    """What was set, or that nothing is known."""
    found = getattr(tokenizer, "rcpo_generation", None)
    return found if isinstance(found, Generation) else Generation()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special tokens, those included that have no role of their own (`<|eot_id|>`, say)."""
    added = {idx for idx, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens as text."""
    return {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))}


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end generation: the tokenizer's EOS, and those of `Generation`."""
    return {*generation_of(tokenizer).end_ids, tokenizer.eos_token_id} - {None}


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """`end_ids` as text."""
    texts = (tokenizer.decode([idx]) for idx in end_ids(tokenizer) if 0 <= idx < len(tokenizer))
    return {str(text) for text in texts if text}


def tokens_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer writes in front of a text that it is called on: a BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    places = range(len(whole) - len(bare) + 1)
    start = next((place for place in places if whole[place : place + len(bare)] == bare), 0)
    return list(whole[:start])
