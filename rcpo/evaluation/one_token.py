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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.data.describe import decoded
from rcpo.data.pairs import TokenizedPair
from rcpo.data.tokenize import tokenize_records
from rcpo.evaluation.moves import Moves, moves
from rcpo.evaluation.moves_summary import top_tokens
from rcpo.models.logprobs import head_sizes
from rcpo.models.policy import Policy
from rcpo.records.arithmetic import NUMBERS, all_problems, assistant_turn, user_turn
from rcpo.records.messages import Messages
from rcpo.records.record import PreferenceRecord

NUM_BUILTIN = 64
"""Prompts made of the embedded model's words."""
SIDES = ("chosen", "rejected")
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


class Watched:
    """A model at the ends of prompts. What was computed is kept, so that the model that all runs started from
    reads each prompt once."""

    def __init__(self, model: PreTrainedModel, pad_id: int, prompts_per_batch: int) -> None:
        policy = Policy(model)
        self.head, self._body = policy.head, policy.body
        self._pad, self._size = pad_id, prompts_per_batch
        self._hidden: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def logits(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Of the next token (n, V)."""
        device = self.head.weight.device
        new = sorted({prompt for prompt in prompts if prompt not in self._hidden}, key=len)
        for start in range(0, len(new), self._size):
            members = new[start : start + self._size]
            ids = torch.full((len(members), len(members[-1])), self._pad)
            for row, prompt in enumerate(members):  # padding on the right: no real position sees it
                ids[row, : len(prompt)] = torch.tensor(prompt)
            states = self._body(input_ids=ids.to(device), use_cache=False).last_hidden_state
            for row, prompt in enumerate(members):
                self._hidden[prompt] = states[row, len(prompt) - 1].clone()
        return self.head.logits(torch.stack([self._hidden[prompt] for prompt in prompts]))


def measure(
    before: Watched,
    after: Watched,
    pairs: Sequence[TokenizedPair],
    tokenizer: PreTrainedTokenizerBase,
    num_top: int,
) -> dict[str, Any]:
    """What became of the answers to these prompts: p(chosen) and p(rejected) before and after as means, the
    share of prompts whose chosen token fell, the tokens that gained and lost most on average, those that
    theory names, and how many tokens it puts before the one that gained most and before the chosen one."""
    sides = torch.tensor([[pair.chosen.input_ids[-1], pair.rejected.input_ids[-1]] for pair in pairs])
    sides = sides.to(before.head.weight.device)
    found: list[tuple[Moves, Moves]] = []
    size = head_sizes(sides.device.type, before.head.weight.shape[0]).chunk_tokens
    for start in range(0, len(pairs), size):
        prompts = [tuple(pair.chosen.input_ids[:-1]) for pair in pairs[start : start + size]]
        logits = before.logits(prompts), after.logits(prompts)
        chosen, rejected = sides[start : start + size].T
        found.append((moves(*logits, chosen, rejected, [], []), moves(*logits, rejected, chosen, [], [])))
    change = torch.stack([both[0].change for both in found]).sum(0).cpu() / len(pairs)
    nats = torch.cat([both[0].nats for both in found])
    theory = named_by_theory(before.head.weight, *map(int, sides[0])).cpu()
    own = [torch.cat([both[side].own for both in found]).mean(0).tolist() for side in range(2)]
    return {
        "prompts": len(pairs),
        **{side: dict(zip(("before", "after"), own[idx], strict=True)) for idx, side in enumerate(SIDES)},
        "fell": float((nats < 0).double().mean()),
        "gained": top_tokens(change, tokenizer, num_top),
        "lost_most": top_tokens(-change, tokenizer, num_top),
        "theory": [
            {"token": decoded([idx], tokenizer), "id": idx, "product": float(theory[idx])}
            for idx in torch.topk(theory, min(num_top, len(theory))).indices.tolist()
        ],
        "theory_before_gainer": int((theory > theory[int(change.argmax())]).sum()),
        "theory_before_chosen": int((theory > theory[int(sides[0, 0])]).sum()),
    }
