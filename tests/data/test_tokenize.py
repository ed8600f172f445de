"""Records to ids with tiny tokenizers: the split of prompt and response, BOS and EOS, truncation,
counts."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import rcpo.data.tokenize
from helpers.tiny_tokenizers import (
    CLOSED_BY_TEMPLATE,
    GENERATION,
    TEMPLATES,
    TURNS,
    chat,
    make_bpe,
    make_words,
    prompt_of,
    response_of,
    sides_of,
    tokenize,
    tokenize_one,
)  # fmt: skip
from rcpo.common.errors import UserError
from rcpo.data.describe import describe_pair
from rcpo.data.template import apply_chat_template_choice
from rcpo.data.tokenize import TokenizedPair, TokenizedSide, tokenize_records
from rcpo.records.record import read_record

# BOS, EOS and the split, for every kind of tokenizer and template


@pytest.mark.parametrize("bos", ["<s>", None], ids=["bos", "no-bos"])
@pytest.mark.parametrize("eos", ["</s>", None], ids=["eos", "no-eos"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_has_the_templates_bos_one_end_and_the_response_alone(
    template: str, eos: str | None, bos: str | None
) -> None:
    """The response is the answer's text and one end token; the prompt is the template's own rendering, but
    for a blank at its end, which is part of the answer's first token. The tokenizer would write a BOS; what
    counts is whether the template does."""
    tokenizer = make_bpe(bos, eos)
    tokenizer.chat_template = TEMPLATES[template]
    question, right, wrong = chat("Is the sky blue?", "No", "What is é?"), "Yes, the sky is blue.", "Né\n\nno"
    pair = tokenize_one(question, right, wrong, tokenizer)
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    end = tokenizer.convert_tokens_to_ids("<|end|>") if template in CLOSED_BY_TEMPLATE else eos_id
    for side, text in zip(sides_of(pair), (right, wrong), strict=True):
        assert all(isinstance(token, int) for token in side.input_ids)
        *body, last = response_of(side) if end is not None else [*response_of(side), None]
        assert last == end
        assert not set(body) & {0, 1, 2, 3}
        assert tokenizer.decode(body).removeprefix(" ") == text
        has_bos = bos_id is not None and "bos_token" in TEMPLATES[template]
        assert side.input_ids.count(0) == has_bos
        assert (side.input_ids[0] == 0) == has_bos
    assert prompt_of(pair.chosen) == prompt_of(pair.rejected)
    rendered = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    if "lacks" in template:
        rendered = rendered.removesuffix("<|turn|>\n")
    shown = tokenizer.decode(prompt_of(pair.chosen))
    assert shown.replace("<s>", "") == rendered.replace("<s>", "").rstrip(" ")


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_without_append_eos_a_response_is_its_own_tokens(template: str | None) -> None:
    """data.append_eos=false: what stands behind the answer is left out, whoever writes it; the rest stays."""
    tokenizer = make_bpe("<s>", "</s>")
    tokenizer.chat_template = None if template is None else TEMPLATES[template]
    texts = ("a", " b", " c") if template is None else (chat("Sky?"), "Yes, it is.", "No")
    record = read_record(*texts, 0)
    whole, bare = (
        tokenize_records([record], tokenizer, 512, None, "error", append_eos=append_eos).pairs[0]
        for append_eos in (True, False)
    )
    for side, short in zip(sides_of(whole), sides_of(bare), strict=True):
        assert short.num_prompt == side.num_prompt
        assert side.input_ids[: len(short.input_ids)] == short.input_ids
        assert len(response_of(side)) == len(response_of(short)) + 1
        assert not set(response_of(short)) & {0, 1, 2, 3}


@pytest.mark.parametrize("bos", ["<s>", None], ids=["bos", "no-bos"])
@pytest.mark.parametrize("eos", ["</s>", None], ids=["eos", "no-eos"])
@pytest.mark.parametrize("has_template", [False, True])
def test_plain_text_is_taken_as_it_is(has_template: bool, eos: str | None, bos: str | None) -> None:
    """Prompt a b, chosen c d, rejected e: in front what the tokenizer writes there, EOS behind where there is
    one, also beside a chat template."""
    tokenizer = make_words(bos, eos)
    tokenizer.chat_template = TEMPLATES["chatml with BOS"] if has_template else None
    pair = tokenize_one("a b", " c d", " e", tokenizer)
    start, end = [0] if bos else [], [1] if eos else []
    assert pair.chosen == TokenizedSide([*start, 10, 11, 12, 13, *end], len(start) + 2)
    assert pair.rejected == TokenizedSide([*start, 10, 11, 14, *end], len(start) + 2)


def test_one_token_as_bos_and_eos() -> None:
    """As in GPT-2: once in front, once behind."""
    pair = tokenize_one("a", " b", " c", make_words("</s>", "</s>"))
    assert pair.chosen.input_ids == [1, 10, 11, 1]


def test_a_bos_that_nothing_writes_is_not_there_and_that_is_said_once() -> None:
    """SmolLM2's tokenizer has one and does not write it in front of a text; phi-3's template does not
    either. Where the text has one itself, all is well."""
    tokenizer = make_bpe(writes_bos=False)
    records = [read_record("q1", " yes", " no", number) for number in range(2)]
    data = tokenize(records, tokenizer)
    assert {side.input_ids[0] for pair in data.pairs for side in sides_of(pair)} == {
        tokenizer("q1")["input_ids"][0]
    }
    assert list(data.notes.values()) == [
        "the tokenizer writes no <s> in front, so that inference does not see it either; if the model was "
        "trained with it, begin the prompts with it"
    ]
    data = tokenize([read_record("<s>q1", " yes", " no", 0)], tokenizer)
    assert prompt_of(data.pairs[0].chosen)[0] == 0
    assert data.notes == {}
    tokenizer = make_bpe()
    tokenizer.chat_template = TEMPLATES["EOS after the answer"]
    data = tokenize([read_record(chat("q1"), "yes", "no", 0)], tokenizer)
    assert data.pairs[0].chosen.input_ids[0] != 0
    assert [note[:41] for note in data.notes.values()] == ["the chat template writes no <s> in front,"]


def test_what_a_tokenizer_writes_in_front_survives_a_cut() -> None:
    """GLM-4's writes two tokens; here <|turn|> <s>."""
    tokenizer = make_words()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["<|turn|>", "<s>", "$A", "</s>"],
        special_tokens=[("<|turn|>", 2), ("<s>", 0), ("</s>", 1)],
    )
    pair = tokenize_one("a b c d e", " f", " g", tokenizer, max_length=8, max_prompt_length=4)
    assert pair.chosen == TokenizedSide([2, 0, *words("d e f"), 1], 4)
    assert tokenize_one("a", " f", " g", tokenizer).chosen == TokenizedSide([2, 0, *words("a f"), 1], 3)


def test_markers_that_the_text_holds_already_are_not_doubled() -> None:
    """UltraFeedback has answers that end with another model's EOS, and prompts that begin with a BOS."""
    pair = tokenize_one("<s> a", " b </s>", " c", make_words())
    assert pair.chosen.input_ids == [0, 10, 11, 1]
    assert pair.rejected.input_ids == [0, 10, 12, 1]
    tokenizer = make_words()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' </s>' }}{% endfor %}"
    assert tokenize_one(chat("a"), "b</s>", "c", tokenizer).chosen.input_ids == [10, 1, 11, 1]


def test_a_default_system_prompt_never_leaks_into_a_response() -> None:
    """The template writes a system turn wherever the first turn is none, so also around an answer alone."""
    tokenizer = make_bpe()
    tokenizer.chat_template = TEMPLATES["default system prompt"]
    assert "helpful" in tokenizer.apply_chat_template([{"role": "assistant", "content": "x"}], tokenize=False)
    pair = tokenize_one(chat("q1"), "yes", "no", tokenizer)
    assert "You are helpful." in tokenizer.decode(prompt_of(pair.chosen))
    assert [tokenizer.decode(response_of(side)) for side in sides_of(pair)] == ["yes<|end|>", "no<|end|>"]
    own = tokenize_one(chat("q1", system="It is four."), "yes", "no", tokenizer)
    assert "helpful" not in tokenizer.decode(own.chosen.input_ids)


# Where the response begins


def make_merging() -> PreTrainedTokenizerFast:
    """Characters, of which a and b merge: x 0, a 1, b 2, c 3, ab 4."""
    tokenizer = Tokenizer(models.BPE({"x": 0, "a": 1, "b": 2, "c": 3, "ab": 4}, [("a", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_token_across_the_boundary_belongs_to_the_response() -> None:
    """Prompt xa; chosen bc is x ab|c, rejected c is x a c: the shared prompt is x alone, and both responses
    hold what the model must predict."""
    data = tokenize([read_record("xa", "bc", "c", 0)], make_merging())
    assert data.pairs == [TokenizedPair(TokenizedSide([0, 4, 3], 1), TokenizedSide([0, 1, 3], 1), 0)]
    assert "1 sides have a token that spans prompt and response (scored)" in data.report


def test_a_response_that_changes_the_prompts_own_tokens_shortens_the_prompt() -> None:
    """Prompt abc; cd merges before bc, so chosen d makes a b cd, rejected x makes a bc x: they share a
    alone."""
    vocabulary = {token: idx for idx, token in enumerate(["a", "b", "c", "d", "x", "bc", "cd"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("c", "d"), ("b", "c")]))
    pair = tokenize_one("abc", "d", "x", PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert pair.chosen == TokenizedSide([0, 1, 6], 1)
    assert pair.rejected == TokenizedSide([0, 5, 4], 1)


def test_a_prompt_that_merges_into_both_responses_is_refused() -> None:
    """Prompt a, sides b and bc: no token is the prompt's alone, and there is no BOS to begin with."""
    data = tokenize([read_record("a", "b", "bc", 0)], make_merging(), on_bad_row="drop")
    assert data.pairs == []
    assert data.dropped == {
        "no token is left of the prompt, and nothing is written in front of it; give a longer prompt": [0]
    }


def test_characters_of_several_tokens_stay_in_the_response() -> None:
    """One emoji is four bytes, so four tokens with the same offsets in the untrained tokenizer."""
    tokenizer = make_bpe()
    pair = tokenize_one("q1", "😀", "😁", tokenizer)
    assert [len(response_of(side)) for side in sides_of(pair)] == [5, 5]
    assert prompt_of(pair.chosen) == tokenizer("q1")["input_ids"]


def test_a_marker_that_swallows_white_space_stays_in_the_prompt() -> None:
    """<|turn|> takes the blank behind it, which is the answer's first character."""
    tokenizer = make_words()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|go|>", rstrip=True, special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ '<|go|>' }}{% endif %}{% endfor %}"
    )
    go = tokenizer.convert_tokens_to_ids("<|go|>")
    pair = tokenize_one(chat("a"), " b", " c", tokenizer)
    assert pair.chosen == TokenizedSide([10, go, 11, 1], 2)


def test_tokenizers_without_offsets_split_at_the_common_beginning() -> None:
    """ByT5: bytes + 3, EOS 1, no BOS, not a fast tokenizer."""
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    pair = tokenize_one("ab", "cd", "é", tokenizer)
    assert pair.chosen == TokenizedSide([100, 101, 102, 103, 1], 2)
    assert pair.rejected == TokenizedSide([100, 101, 198, 172, 1], 2)


# Truncation


def words(text: str) -> list[int]:
    return [10 + ord(word) - ord("a") for word in text.split()]


@pytest.mark.parametrize(
    ("max_length", "max_prompt_length", "prompt", "chosen", "rejected"),
    [
        # Whole: 1 + 6 prompt tokens, 5 + 1 and 2 + 1 response tokens.
        (13, None, [0, *words("a b c d e f")], [*words("p q r s t"), 1], [*words("x y"), 1]),
        # The longer response has 6 of 12, so the prompt gets 6, which keeps its BOS and loses a.
        (12, None, [0, *words("b c d e f")], [*words("p q r s t"), 1], [*words("x y"), 1]),
        # The prompt gets half of 8, the chosen response is cut to 4, the rejected one fits its own budget.
        (8, None, [0, *words("d e f")], words("p q r s"), [*words("x y"), 1]),
        # A prompt limit of 3 leaves 5.
        (8, 3, [0, *words("e f")], words("p q r s t"), [*words("x y"), 1]),
        # A prompt limit above its length leaves it whole, and what is left to the responses: 1.
        (8, 7, [0, *words("a b c d e f")], words("p"), words("x")),
        (2, None, [0], words("p"), words("x")),
        (2, 1, [0], words("p"), words("x")),
        # Odd: the prompt gets the larger half.
        (5, None, [0, *words("e f")], words("p q"), words("x y")),
    ],
)
def test_limits_cut_prompts_left_and_responses_right_each_by_its_own_budget(
    max_length: int, max_prompt_length: int | None, prompt: list[int], chosen: list[int], rejected: list[int]
) -> None:
    pair = tokenize_one(
        "a b c d e f", " p q r s t", " x y", make_words(),
        max_length=max_length, max_prompt_length=max_prompt_length,
    )  # fmt: skip
    assert prompt_of(pair.chosen) == prompt_of(pair.rejected) == prompt
    assert response_of(pair.chosen) == chosen
    assert response_of(pair.rejected) == rejected


def test_a_prompt_may_take_what_short_responses_leave() -> None:
    """Of 9 tokens the longer response takes 3, so the prompt keeps BOS and 5 of its 6 words."""
    pair = tokenize_one("a b c d e f", " p", " x y", make_words(), max_length=9)
    assert pair.chosen == TokenizedSide([0, *words("b c d e f p"), 1], 6)
    assert pair.rejected == TokenizedSide([0, *words("b c d e f x y"), 1], 6)


def test_no_limit_ever_empties_a_response_or_is_passed() -> None:
    """Prompts and responses of 1 to 9 words under every limit up to 12, with and without BOS."""
    letters = " ".join("abcdefghi")
    for bos in ("<s>", None):
        tokenizer = make_words(bos)
        records = [
            read_record(letters[: 2 * p - 1], " " + letters[: 2 * n - 1], " z" * m, 0)
            for p in (1, 2, 5, 9)
            for n in (1, 4, 9)
            for m in (1, 4, 9)
        ]
        for max_length in range(2, 13):
            for limit in (None, *range(1, max_length + 2)):
                pairs = tokenize(records, tokenizer, max_length, limit).pairs
                assert len(pairs) == len(records)
                for side in (side for pair in pairs for side in sides_of(pair)):
                    assert 1 <= side.num_prompt <= (limit or max_length)
                    assert side.num_prompt < len(side.input_ids) <= max_length
                    assert bos is None or side.input_ids[0] == 0


def test_cuts_are_counted_and_lengths_described() -> None:
    """Two rows of 1 + 3 prompt tokens in 8: one whole (responses of 2 + 1), one with 6 + 1 chosen tokens,
    whose prompt stays at the 4 that it is offered."""
    records = [
        read_record("a b c", " d e", " f g", 0),
        read_record("a b c", " d e f g h i", " j k", 1),
        read_record("a b c d e", " d e f g h i", " d e f g h j", 2),
    ]
    data = tokenize(records, make_words(), max_length=8, on_bad_row="drop")
    assert data.report == [
        "1 chosen and 0 rejected responses cut from the right (train.max_length=8)",
        "tokens on average: prompt 4.0, chosen 3.5, rejected 3.0; longest row 8",
    ]
    assert data.dropped == {"the sides are identical once cut to train.max_length=8": [2]}
    assert tokenize(records[:1], make_words(), 8, 2).report[0] == (
        "1 prompts cut from the left (train.max_prompt_length=2)"
    )
    assert tokenize(records[:1], make_words(), 6).report[0] == (
        "1 prompts cut from the left (train.max_length=6)"
    )


# Rows that cannot train


def test_rows_that_only_the_tokenizer_makes_unfit_stop_or_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unknown words alike, in batches of 2: the other pairs keep their order."""
    monkeypatch.setattr(rcpo.data.tokenize, "_RECORDS_PER_BATCH", 2)
    records = [read_record("a", " b", " c", n) for n in range(5)]
    records[1] = read_record("a", " ONE", " TWO", 11)
    records[2] = read_record("a", " b  c", " b c", 12)
    with pytest.raises(UserError) as caught:
        tokenize(records, make_words())
    assert str(caught.value) == (
        "data: row 11 (counted from 0) cannot train: the sides are identical once tokenised; mend it or type "
        "data.on_bad_row=drop"
    )
    data = tokenize(records, make_words(), on_bad_row="drop")
    assert [pair.row for pair in data.pairs] == [0, 3, 4]
    assert data.dropped == {"the sides are identical once tokenised": [11, 12]}


def test_rows_that_the_template_refuses_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gemma's, which has no system turn; rows before and behind are kept."""
    tokenizer = make_words()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TURNS
    )
    records = [
        read_record(chat("a", system=system), "b", "c", n) for n, system in enumerate((None, "s", None))
    ]
    data = tokenize(records, tokenizer, on_bad_row="drop")
    assert [pair.row for pair in data.pairs] == [0, 2]
    assert data.dropped == {"the chat template refuses it (no system turn)": [1]}


def test_a_system_turn_that_is_refused_is_named_whatever_the_template_says() -> None:
    """Mistral's first template says that roles must alternate; merged, the row would train."""
    tokenizer = make_words()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TURNS
    )
    two = [*chat("a"), *chat("b")]
    records = [read_record(chat("a", system="s"), "b", "c", 0), read_record(two, "b", "c", 1)]
    data = tokenize(records, tokenizer, on_bad_row="drop")
    refused = "the chat template refuses it (roles must alternate)"
    assert data.dropped == {f"{refused}, as it has a system turn": [0], refused: [1]}
    assert [note for note in data.notes.values() if "data.system=merge" in note]


def test_parts_of_a_prompt_that_the_template_does_not_write_are_counted() -> None:
    """A system turn, the call of an earlier turn and a name; white space, and what was thought, may go."""
    tokenizer = make_bpe()
    tokenizer.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}{{ '<|turn|>' + m['role'] + '\n' }}"
        "{{ m['content'].split('</think>')[-1] | trim + '<|end|>\n' }}{% endfor %}" + GENERATION
    )
    thought = [*chat(" a  b\n", "<think>c</think>d"), *chat("e")]
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
    }
    called = [*chat("a"), call, {"role": "tool", "content": "5", "name": "adder"}]
    prompts = [thought, chat("a", system="be kind"), chat("b", system="be kind"), called]
    records = [read_record(prompt, "yes", "no", row) for row, prompt in enumerate(prompts)]
    says = ", which the chat template does not write"
    notes = tokenize(records, tokenizer).notes
    assert {what: note for what, note in notes.items() if says in what} == {
        f"a system turn{says}": f"2 rows have a system turn{says}",
        f"tool calls in the prompt{says}": f"1 rows have tool calls in the prompt{says}",
        f"a name of a message{says}": f"1 rows have a name of a message{says}",
    }


def test_messages_need_a_template() -> None:
    with pytest.raises(UserError) as caught:
        tokenize_one(chat("a"), "b", "c", make_words(), on_bad_row="drop")
    assert str(caught.value) == (
        "model.chat_template=null: the data are messages and the tokenizer has no chat template; "
        "type model.chat_template=plain"
    )


# The example and the choice of a template


def test_the_described_example_shows_what_is_scored() -> None:
    tokenizer = make_words()
    pair = tokenize_one("a b", " c d", " e", tokenizer)
    assert describe_pair(pair, tokenizer).splitlines() == [
        "prompt   (3 tokens, not scored): ⟦<s>⟧a b",
        "chosen   (3 tokens, scored): «c d⟦</s>⟧»",
        "rejected (2 tokens, scored): «e⟦</s>⟧»",
    ]
    bpe = make_bpe()
    bpe.chat_template = TEMPLATES["chatml"]
    shown = describe_pair(tokenize_one(chat("q1"), "yes\nyes", "no", bpe), bpe).splitlines()
    assert shown[0].endswith("scored): ⟦<|turn|>⟧user\\nq1⟦<|end|>⟧\\n⟦<|turn|>⟧assistant\\n")
    assert shown[1].endswith("«yes\\nyes⟦<|end|>⟧»")


def test_a_template_is_kept_set_to_plain_or_read_from_a_file(tmp_path: Path) -> None:
    tokenizer = make_words()
    tokenizer.chat_template = TEMPLATES["chatml"]
    apply_chat_template_choice(tokenizer, None)
    assert tokenizer.chat_template == TEMPLATES["chatml"]
    apply_chat_template_choice(tokenizer, "plain")
    assert tokenizer.apply_chat_template(
        chat("a", " b ", "c"), tokenize=False, add_generation_prompt=True
    ) == ("<s>User: a\n\nAssistant: b</s>\n\nUser: c\n\nAssistant:")
    (tmp_path / "t.jinja").write_text(TEMPLATES["chatml with BOS"])
    apply_chat_template_choice(tokenizer, str(tmp_path / "t.jinja"))
    assert tokenizer.chat_template == TEMPLATES["chatml with BOS"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "={path}: no such file; give a jinja file, or type plain or null"),
        (b"\xff\xfe", "={path}: is not UTF-8 text; give a jinja file"),
        (b"hello", ": the template does not show an assistant turn; type model.chat_template=plain"),
        (
            b"{% if %}",
            ": the chat template refuses it (Expected an expression, got 'end of statement block'); "
            "type model.chat_template=plain",
        ),
    ],
)
def test_templates_that_cannot_be_are_one_line(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "t.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        apply_chat_template_choice(make_words(), str(path))
    assert str(caught.value) == "model.chat_template" + expected.format(path=path)


def test_pairs_are_held_as_flat_arrays() -> None:
    """100,000 pairs are held in memory by every rank: 4 bytes a token, and 72 bytes a pair."""
    records = [read_record("q1", "é" * 40, "😀" * 9, n) for n in range(3)]
    data = tokenize(records, make_bpe())
    num_tokens = sum(len(side.input_ids) for pair in data.pairs for side in sides_of(pair))
    assert sum(column.nbytes for column in data.pairs.arrays) == 4 * num_tokens + 72 * len(records)


CUT_THINKING = TURNS.replace("m['content']", "m['content'].split('</think>')[-1]") + GENERATION
"""As DeepSeek-R1's: what an answer thinks before </think> is cut out of it."""
TOOLS = (
    "{% if tools %}{{ '<|turn|>tools ' + tools[0]['name'] + '<|end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ ' call ' + c['function']['name'] }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}" + GENERATION
)


def test_a_response_that_the_template_cuts_is_refused() -> None:
    """Or counted; reasoning in a field of its own that the template does not write, likewise."""
    tokenizer = make_bpe()
    tokenizer.chat_template = CUT_THINKING
    said = "the chat template leaves out a part of the response"
    record = read_record(chat("a"), chat("a", "b c</think>d")[1:], chat("a", "e")[1:], 0)
    with pytest.raises(UserError, match=said):
        tokenize([record], tokenizer)
    data = tokenize([record], tokenizer, on_bad_row="drop")
    ((reason, rows),) = data.dropped.items()
    assert reason.startswith(said)
    assert rows == [0]
    own = [{"role": "assistant", "content": "d", "reasoning_content": "b c"}]
    with pytest.raises(UserError, match="the chat template leaves out the response's reasoning_content"):
        tokenize([read_record(chat("a"), own, chat("a", "e")[1:], 0)], tokenizer)


def test_tools_and_calls_reach_the_template() -> None:
    """Definitions stand in the prompt; a call is scored."""
    tokenizer = make_bpe()
    tokenizer.chat_template = TOOLS
    call = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    ]
    record = read_record(chat("a"), call, chat("a", "no")[1:], 0, tools=[{"name": "add"}])
    pair = tokenize([record], tokenizer).pairs[0]
    assert "tools add" in tokenizer.decode(prompt_of(pair.chosen))
    assert "call add" in tokenizer.decode(response_of(pair.chosen))
    tokenizer.chat_template = TURNS + GENERATION
    with pytest.raises(UserError, match="the chat template leaves out the response's tool calls"):
        tokenize([record], tokenizer)


def test_what_else_a_template_is_given_comes_from_the_config_and_from_the_row() -> None:
    tokenizer = make_bpe()
    tokenizer.chat_template = "{{ mood }}" + TURNS + GENERATION
    row = ("a", [{"role": "assistant", "content": "b"}], [{"role": "assistant", "content": "c"}])
    records = [read_record(*row, 0), read_record(*row, 1, template_kwargs={"mood": "yes"})]
    pairs = tokenize_records(records, tokenizer, 512, None, "error", {"mood": "no"}).pairs
    assert [tokenizer.decode(prompt_of(pair.chosen)).split("<|turn|>")[0] for pair in pairs] == [
        "no",
        "yes",
    ]
