"""The one-token experiment: prompts that are answered with one token, which token gains, and which one theory
names.

A step on log p(chosen) - log p(rejected) moves the last hidden state by W_w - W_l, the difference of the two
tokens' unembeddings, so that the logit of token v moves by <W_v, W_w - W_l>: the tokens with the largest such
product gain, and where a token's is larger than the chosen one's it may take the chosen one's probability.
Razin et al. 2024 (arXiv 2410.08847). Exact for a step on the hidden state alone; training moves the
unembeddings too. Does not train (`rcpo.commands.lab_persona` has `rcpo sweep` do it)."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.data.describe import decoded
from rcpo.data.pairs import TokenizedPair
from rcpo.data.tokenize import tokenize_records
from rcpo.evaluation.moves import SideMoves, follow
from rcpo.evaluation.moves_summary import top_tokens
from rcpo.models.policy import Policy
from rcpo.records.arithmetic import NUMBERS, all_problems, assistant_turn, user_turn
from rcpo.records.messages import Messages
from rcpo.records.record import PreferenceRecord

NUM_BUILTIN = 64
"""Prompts made of the embedded model's words."""
LONGEST = 10**6
"""Tokens of a prompt; training says what is too long."""


class Words(NamedTuple):
    """A chosen and a rejected answer of one token."""

    chosen: str
    rejected: str

    @property
    def label(self) -> str:
        return f"{self.chosen}-{self.rejected}".lower()


def builtin_prompts(words: Words, tokenizer: PreTrainedTokenizerBase) -> list[str | Messages]:
    """Word problems whose answer is the chosen number word, up to that word: "... alice has". Raises
    UserError for words that are no numbers."""
    for word in words:
        if word not in NUMBERS:
            raise UserError(
                f"pairs={words.chosen}/{words.rejected}: {word} is no number word of the embedded model's; "
                f"choose two of {', '.join(NUMBERS)}, or give prompts=FILE"
            )
    problems = [problem for problem in all_problems() if NUMBERS[problem.answer] == words.chosen]
    random.Random(words.chosen).shuffle(problems)
    asked = (
        (
            tokenizer.apply_chat_template(
                user_turn(each.prompt()), tokenize=False, add_generation_prompt=True
            ),
            each,
        )
        for each in problems[:NUM_BUILTIN]
    )
    return [f"{text}{problem.name} has" for text, problem in asked]


def rows_of(prompts: Sequence[str | Messages], words: Words) -> list[dict[str, Any]]:
    """A pair for each prompt, as a file has it: messages answered by turns, text by a word behind a space."""
    rows: list[dict[str, Any]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            space = "" if prompt[-1:].isspace() else " "
            rows.append(
                {"prompt": prompt, "chosen": space + words.chosen, "rejected": space + words.rejected}
            )
        else:
            sides = {"chosen": words.chosen, "rejected": words.rejected}
            rows.append({"prompt": prompt} | {side: assistant_turn(word) for side, word in sides.items()})
    return rows


def tokens_of(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, words: Words
) -> list[TokenizedPair]:
    """The pairs with answers of one token each. Raises UserError where a word is more of this model's."""
    records = [
        PreferenceRecord(row["prompt"], row["chosen"], row["rejected"], number)
        for number, row in enumerate(rows)
    ]
    pairs = list(tokenize_records(records, tokenizer, LONGEST, None, "error", append_eos=False).pairs)
    for pair in pairs:
        for side, word in zip((pair.chosen, pair.rejected), words, strict=True):
            answer = side.input_ids[side.num_prompt :]
            if len(answer) != 1:
                shown = " ".join(decoded([idx], tokenizer) for idx in answer)
                raise UserError(
                    f"pairs={words.chosen}/{words.rejected}: {word} is {len(answer)} tokens behind row "
                    f"{pair.row}'s prompt ({shown}); choose a word of one token"
                )
    return pairs


def named_by_theory(weight: Tensor, chosen: int, rejected: int) -> Tensor:
    """<W_v, W_w - W_l> of every token (V,), from unembeddings (V, H)."""
    wide = weight.detach().double()
    return wide @ (wide[chosen] - wide[rejected])


def measure(
    policies: tuple[Policy, Policy],
    pairs: Sequence[TokenizedPair],
    tokenizer: PreTrainedTokenizerBase,
    num_top: int,
    pairs_per_batch: int,
) -> dict[str, Any]:
    """What became of the answers to these prompts: p(chosen) and p(rejected) before and after as means, the
    share of prompts whose chosen token fell, the tokens that gained and lost most on average, those that
    theory names, and how many tokens it puts before the one that gained most."""
    pad = tokenizer.pad_token_id
    chosen, rejected = follow(*policies, pairs, 0 if pad is None else int(pad), pairs_per_batch, [], [])
    change = chosen.change / len(pairs)
    first = pairs[0]
    ids = (first.chosen.input_ids[-1], first.rejected.input_ids[-1])
    theory = named_by_theory(policies[0].head.weight, *ids).cpu()
    gainer = int(change.argmax())
    return {
        "prompts": len(pairs),
        "chosen": _probabilities(chosen),
        "rejected": _probabilities(rejected),
        "fell": float((chosen.nats < 0).double().mean()),
        "gained": top_tokens(change, tokenizer, num_top),
        "lost_most": top_tokens(-change, tokenizer, num_top),
        "theory": [
            {"token": decoded([idx], tokenizer), "id": idx, "product": float(theory[idx])}
            for idx in torch.topk(theory, min(num_top, len(theory))).indices.tolist()
        ],
        "theory_before_gainer": int((theory > theory[gainer]).sum()),
        "theory_before_chosen": int((theory > theory[ids[0]]).sum()),
    }


def _probabilities(moved: SideMoves) -> dict[str, float]:
    before, after = moved.own.mean(0).tolist()
    return {"before": before, "after": after}
