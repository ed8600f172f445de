"""Conversations with several answers: what of the template's text is scored, in today's formats; the numbers
of a batch; and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.chat_formats import FORMATS
from helpers.tiny_models import make_llama
from helpers.tiny_tokenizers import chat, make_bpe, response_of
from rcpo.data.batch import collate
from rcpo.data.describe import answers_marked
from rcpo.data.joint import collate_joint
from rcpo.data.packer import pack
from rcpo.data.pairs import NO_SIDE, TokenizedPair, TokenizedSide, pair_digest
from rcpo.data.token_store import Tokens, TokenStore
from rcpo.data.tokenize import TokenizedData, tokenize_records
from rcpo.method.metrics import displacement_row
from rcpo.models.policy import Policy
from rcpo.records.account import Account, RowAccount
from rcpo.records.conversations import read_conversation
from rcpo.records.record import BadRowError, read_record
from rcpo.reference.cache import side_key

OTHER_ENDS = {"gpt-oss": "<|channel|>final<|message|>yes<|end|>", "Falcon": " yes", "Nemotron": "yes",
              "Phi-3, no generation_config": "yes<|end|>", "Qwen3": "yes<|im_end|>"}  # fmt: skip
"""What is scored of an answer that another turn follows, where that is not what is scored of one alone."""
NOT_STABLE = "Qwen3, enable_thinking=false"
"""Its generation prompt has a block of reasoning that answered turns lack."""


def tokens_of(turns: list[dict[str, Any]], name: str, on_bad_row: str = "error") -> TokenizedData:
    form = FORMATS[name]
    record = read_conversation(turns, 0)
    return tokenize_records([record], form.tokenizer(), 512, None, on_bad_row, form.kwargs)


def answers_of(side: TokenizedSide, name: str) -> list[str]:
    """The scored text, answer by answer."""
    return answers_marked(side, FORMATS[name].tokenizer()).replace("⟦", "").replace("⟧", "").split("«")[1:]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != NOT_STABLE])
def test_every_answer_is_scored_as_in_a_row_of_its_own(name: str) -> None:
    """q1 yes q2 no: the tokens are those of the pair whose prompt is q1 yes q2, the last answer's mask too.
    The first answer ends as the template ends it where a turn follows."""
    side = tokens_of(chat("q1", "yes", "q2", "no"), name).pairs[0].chosen
    record = read_record(chat("q1", "yes", "q2"), "no", "maybe", 0)
    form = FORMATS[name]
    alone = tokenize_records([record], form.tokenizer(), 512, None, "error", form.kwargs).pairs[0].chosen
    assert side.input_ids == alone.input_ids
    places = side.scored_at.tolist()
    assert places[-len(response_of(alone)) :] == list(range(alone.num_prompt, alone.num_tokens))
    first, last = (text.partition("»")[0] for text in answers_of(side, name))
    assert first == OTHER_ENDS.get(name, form.response)
    assert last == form.response.replace("yes", "no")


def test_of_one_answer_the_tokens_are_those_of_a_pair() -> None:
    for name in ("Qwen3", "Llama 2", "gpt-oss"):
        form = FORMATS[name]
        record = read_record(chat("q1"), "yes", "no", 0)
        pair = tokenize_records([record], form.tokenizer(), 512, None, "error", form.kwargs).pairs[0]
        made = tokens_of(chat("q1", "yes"), name).pairs[0]
        assert made.chosen == pair.chosen
        assert made.chosen.scored is None
        assert made.rejected == NO_SIDE


def test_a_template_that_is_not_stable_needs_marks_of_its_own() -> None:
    turns = chat("q1", "yes", "q2", "no")
    (reason,) = _reasons(turns)
    assert "writes an earlier turn in another way" in reason
    form = FORMATS[NOT_STABLE]
    tokenizer = form.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
        "<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    record = read_conversation(turns, 0)
    side = tokenize_records([record], tokenizer, 512, None, "error").pairs[0].chosen
    assert [text.partition("»")[0] for text in answers_of(side, NOT_STABLE)] == [
        "yes<|im_end|>",
        "no<|im_end|>",
    ]


def _reasons(turns: list[dict[str, Any]]) -> list[str]:
    form = FORMATS[NOT_STABLE]
    records = [read_conversation(turns, 0), read_conversation(chat("q1", "yes"), 1)]
    return list(tokenize_records(records, form.tokenizer(), 512, None, "drop", form.kwargs).dropped)


def test_reasoning_that_the_template_cuts_from_an_earlier_answer_cannot_train() -> None:
    thought = {"role": "assistant", "content": "yes", "reasoning_content": "because"}
    turns = [*chat("q1"), thought, *chat("q2", "no")]
    records = [read_conversation(turns, 0), read_conversation(chat("q1", "yes"), 1)]
    dropped = tokenize_records(records, FORMATS["Qwen3"].tokenizer(), 512, None, "drop").dropped
    (reason,) = dropped
    assert "leaves out the response's reasoning_content" in reason


def test_a_cut_keeps_the_prompt_and_ends_with_an_answer() -> None:
    """Of q1 yes q2 no at 36 tokens the last answer is cut off, and what stands behind the first with it."""
    form = FORMATS["Llama 2"]
    record = read_conversation(chat("q1", "yes", "q2", "no"), 0)
    whole = tokenize_records([record], form.tokenizer(), 512, None, "error").pairs[0].chosen
    assert whole.scored is not None
    room = whole.num_prompt + int(np.flatnonzero(~whole.scored)[0]) + 2
    cut = tokenize_records([record], form.tokenizer(), room, None, "error").pairs[0].chosen
    assert cut.num_tokens < room
    assert answers_of(cut, "Llama 2") == [" yes </s>»"]
    assert cut.scored is None


BAD = {
    "messages is text, and no messages": "hello",
    "the last turn of the assistant is empty": chat("q", " "),
    "messages ends with a turn of the role user, not assistant": chat("q", "a", "q"),
    "there is no turn before the answer": [{"role": "assistant", "content": "a"}],
    "messages has a message without role and content": [{"role": "user"}],
    "messages is null": None,
    "messages is empty": [],
    "an assistant turn follows one of the role assistant, not user or tool": [
        *chat("q", "a"), {"role": "assistant", "content": "b"}, *chat("q", "a")
    ],
    "turn 1 (counted from 0) of the conversation is empty": chat("q", "", "q", "a"),
    "the first turn is the assistant's, so that there is nothing that it answers": [
        {"role": "assistant", "content": "hi"}, *chat("q", "a")
    ],
    "messages has a system turn that is not its first": [
        *chat("q", "a"), {"role": "system", "content": "s"}, *chat("q", "a")
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_rows_that_cannot_train(reason: str) -> None:
    with pytest.raises(BadRowError) as error:
        read_conversation(BAD[reason], 0)
    assert str(error.value) == reason


def masked_pairs() -> list[TokenizedPair]:
    """Two conversations of two answers with 2 and 3 tokens of other turns between them, and one of one."""
    first = TokenizedSide([1, 5, 6, 7, 8, 9, 10, 11], 2, np.array([True, True, False, False, True, True]))
    second = TokenizedSide([1, 9, 8, 7, 6, 5, 4], 1, np.array([True, False, False, False, True, True]))
    whole = TokenizedSide([1, 12, 13, 14], 2)
    return [TokenizedPair(side, NO_SIDE, row) for row, side in enumerate((first, second, whole))]


def test_z_is_the_sum_over_answers_of_rows_of_their_own() -> None:
    """On a padded grid and packed on one row; |y| counts answers alone."""
    policy = Policy(make_llama())
    pairs = masked_pairs()
    expected = []
    for pair in pairs:
        ids, total = pair.chosen.input_ids, 0.0
        for place in pair.chosen.scored_at.tolist():
            alone = TokenizedPair(TokenizedSide(ids[: place + 1], place), NO_SIDE, 0)
            total += float(policy(collate([alone], 0))[0].detach())
        expected.append(total)
    for batch in (
        collate(pairs, 0),
        collate_joint(pairs, 0, False, True),
        collate_joint(pairs, 0, True, False),
    ):
        assert batch.lengths.tolist() == [4, 3, 2, 0, 0, 0]
        torch.testing.assert_close(policy(batch)[:3], torch.tensor(expected), atol=2e-5, rtol=1e-5)
        assert sorted(batch.targets.tolist()) == sorted([6, 7, 10, 11, 9, 5, 4, 13, 14])


def test_masks_are_kept_and_tell_rows_apart(tmp_path: Path) -> None:
    pairs = masked_pairs()
    packed = pack(pairs)
    assert packed.has_conversations
    assert packed.num_scored.tolist() == [[4, 0], [3, 0], [2, 0]]
    assert packed.take([2, 0])[1] == pairs[0]
    account = Account(RowAccount("a", 3, trained=3), None, [])
    store = TokenStore(tmp_path, "key")
    store.write(Tokens(packed, pack(pairs[2:]), [], account))
    kept = store.read()
    assert kept is not None
    assert list(kept.train) == pairs
    assert not kept.held_out.has_conversations
    unmasked = TokenizedSide(pairs[0].chosen.input_ids, 2)
    assert unmasked != pairs[0].chosen
    assert side_key(unmasked) != side_key(pairs[0].chosen)
    assert pair_digest(TokenizedPair(unmasked, NO_SIDE, 0)) != pair_digest(pairs[0])


def test_chosen_answers_alone_have_no_metrics_of_rejected_ones() -> None:
    """r_w = 1, -3: mean -1, half fell."""
    present = torch.tensor([[True, True], [False, False]])
    z, nothing = torch.tensor([-4.0, -8.0]), torch.zeros(2)
    row = displacement_row(z, nothing, torch.tensor([-5.0, -5.0]), nothing, 1, None, present)
    assert row == {
        "displacement/chosen": -1.0, "displacement/chosen_down": 0.5, "logps/chosen": -6.0,
        "probed/chosen": 1.0, "unprobed/chosen": -3.0,
    }  # fmt: skip


def test_a_tokenizer_without_offsets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from rcpo.common.errors import UserError

    tokenizer = make_bpe()
    tokenizer.chat_template = FORMATS["Llama 2"].template
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="gives no offsets; give rows of one answer"):
        tokenize_records([read_conversation(chat("q", "a", "q", "b"), 0)], tokenizer, 64, None, "error")
