"""Tokens as text, for the log and for `rcpo data`: special ones in ⟦ ⟧, what is scored in « »."""

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from rcpo.data.generation import special_ids
from rcpo.data.pairs import PackedPairs, TokenizedPair, TokenizedSide

_MANY = 5
"""Of one special token in a row: their number is shown, as of those that stand for an image."""


def describe_pair(pair: TokenizedPair, tokenizer: PreTrainedTokenizerBase) -> str:
    """One decoded pair for the log: response tokens, which alone are scored, in « », special tokens in ⟦
    ⟧."""
    prompt = pair.prompt_ids
    lines = [f"prompt   ({len(prompt)} tokens, not scored): {_on_one_line(prompt, tokenizer)}"]
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not side.num_tokens:
            continue
        lines.append(f"{name:8} ({side.num_scored} tokens, scored): {_marked(side, tokenizer)}")
    return "\n".join(lines)


def describe_lengths(pairs: PackedPairs) -> list[str]:
    """Tokens on average, of the responses that are there; nothing where there are none."""
    if not len(pairs):
        return []
    lengths, num_prompt, num_scored = pairs.arrays.lengths, pairs.arrays.num_prompt, pairs.num_scored
    prompt = int(num_prompt.max(axis=1).sum()) / int(pairs.present.any(axis=1).sum())
    present = pairs.present.sum(axis=0).clip(min=1)
    chosen, rejected = (int(num) / int(of) for num, of in zip(num_scored.sum(axis=0), present, strict=True))
    return [
        f"tokens on average: prompt {prompt:.1f}, chosen {chosen:.1f}, rejected {rejected:.1f}; "
        f"longest row {int(lengths.max())}"
    ]


def _marked(side: TokenizedSide, tokenizer: PreTrainedTokenizerBase) -> str:
    """A response on one line, its answers in « »."""
    return answers_marked(side, tokenizer).replace("\n", "\\n")


def answers_marked(side: TokenizedSide, tokenizer: PreTrainedTokenizerBase) -> str:
    """A response, what is scored of it in « », and the turns between its answers without."""
    response = side.input_ids[side.num_prompt :]
    mask = [True] * len(response) if side.scored is None else side.scored.tolist()
    parts = []
    for is_scored, run in groupby(zip(mask, response, strict=True), lambda each: each[0]):
        text = decoded([token for _, token in run], tokenizer)
        parts.append(f"«{text}»" if is_scored else text)
    return "".join(parts)


def _on_one_line(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return decoded(ids, tokenizer).replace("\n", "\\n")


def decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens; special ones in ⟦ ⟧."""
    special = special_ids(tokenizer)
    parts = []
    for is_special, run in groupby(ids, lambda token: token in special):
        if is_special:
            for token, same in groupby(run):
                num, shown = len(list(same)), f"⟦{tokenizer.convert_ids_to_tokens(token)}⟧"
                parts.append(shown * num if num < _MANY else f"{shown} x {num}")
        else:
            parts.append(str(tokenizer.decode(list(run), clean_up_tokenization_spaces=False)))
    return "".join(parts)
