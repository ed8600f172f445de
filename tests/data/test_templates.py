"""Chat formats of today's models, one after the other: where inference begins, where it ends, and what lies
between."""

import json
from dataclasses import replace
from typing import Any

import pytest

from helpers.chat_formats import FORMATS
from helpers.chat_formats import turns as turns_of
from helpers.tiny_tokenizers import GENERATION, TURNS, chat, make_bpe, prompt_of, response_of, sides_of
from rcpo.common.errors import UserError
from rcpo.data.generation import generation_of, set_generation
from rcpo.data.template import look_at_template
from rcpo.data.tokenize import tokenize_records
from rcpo.records.record import BadRowError, read_record


@pytest.mark.parametrize("name", FORMATS)
def test_a_response_is_what_the_model_writes_up_to_the_token_that_ends_it(name: str) -> None:
    """Of both sides, token by token. Where the template's turn does not end generation, that is said."""
    form = FORMATS[name]
    tokenizer = form.tokenizer()
    record = read_record(chat("q1"), "yes", "no", 0)
    data = tokenize_records([record], tokenizer, 512, None, "error", form.kwargs)
    pair = data.pairs[0]
    assert tokenizer.decode(prompt_of(pair.chosen)) == form.prompt
    assert tokenizer.decode(response_of(pair.chosen)) == form.response
    assert tokenizer.decode(response_of(pair.rejected)) == form.response.replace("yes", "no")
    last = {tokenizer.convert_ids_to_tokens(side.input_ids[-1]) for side in sides_of(pair)}
    assert (last <= {form.eos, *form.ends}) == form.stops_there
    assert any("does not end there" in note for note in data.notes.values()) != form.stops_there


def test_a_call_that_the_next_turn_ends_is_ended_by_the_tool_s() -> None:
    """GLM-4.5 writes nothing behind a turn: after an answer inference ends at <|user|>, after a call at
    <|observation|>."""
    tokenizer = FORMATS["GLM-4"].tokenizer()
    calls = "{% for c in m['tool_calls'] %}<tool_call>{{ c['function']['name'] }}</tool_call>{% endfor %}"
    others = (
        "{% if m['role'] == 'tool' %}<|observation|>\n@a{% else %}<|assistant|>\n@a" + calls + "{% endif %}"
    )
    tokenizer.chat_template = turns_of("<|user|>\n@q", others, "<|assistant|>")
    answer = {"role": "assistant", "content": "no"}
    record = read_record(chat("q1"), [{"role": "assistant", **CALL}], [answer], 0)
    pair = tokenize_records([record], tokenizer, 512, None, "error").pairs[0]
    assert [tokenizer.decode(response_of(side)) for side in sides_of(pair)] == [
        "\n<tool_call>add</tool_call><|observation|>",
        "\nno<|user|>",
    ]


# Reasoning


def said(name: str, chosen: Any, rejected: Any, response: Any = "template", **kwargs: Any) -> list[str]:
    """Both sides' scored text under a format; `response` is model.response. Answers are text, or what a
    message has beside its role."""
    form = FORMATS[name]
    tokenizer = form.tokenizer()
    set_generation(tokenizer, replace(generation_of(tokenizer), response=response))
    sides = [
        [{"role": "assistant", **({"content": side} if isinstance(side, str) else side)}]
        for side in (chosen, rejected)
    ]
    record = read_record(chat("q1", **kwargs), *sides, 3)
    pair = tokenize_records([record], tokenizer, 512, None, "error", form.kwargs).pairs[0]
    return [tokenizer.decode(response_of(side)) for side in sides_of(pair)]


def prompt_end(name: str, response: Any = "template") -> str:
    form = FORMATS[name]
    tokenizer = form.tokenizer()
    set_generation(tokenizer, replace(generation_of(tokenizer), response=response))
    record = read_record(chat("q1"), "a</think>yes", "b</think>no", 0)
    pair = tokenize_records([record], tokenizer, 512, None, "error", form.kwargs).pairs[0]
    return tokenizer.decode(prompt_of(pair.chosen)[-12:])


WHOLE = "<think>\nabc\n</think>\n\nyes"


@pytest.mark.parametrize("given", [WHOLE, {"content": "yes", "reasoning_content": "abc"}, "abc</think>yes"])
def test_reasoning_is_scored_as_qwen3_writes_it(given: Any) -> None:
    """Inline or in a field of its own, behind a generation prompt without a block; with one that opens it,
    what stands behind <think> is scored."""
    assert said("Qwen3", given, "no") == [
        "<think>\nabc\n</think>\n\nyes<|im_end|>",
        "<think>\n\n</think>\n\nno<|im_end|>",
    ]
    assert said("Qwen3 Thinking", given, "no") == [
        "abc\n</think>\n\nyes<|im_end|>",
        "\n</think>\n\nno<|im_end|>",
    ]


def test_what_stands_between_the_generation_prompt_and_a_response_is_told() -> None:
    """With the words that put Qwen3's empty block into the prompt, unless they are typed already."""
    told = {
        "Qwen3": ["<think> </think> in front of a response; it is scored, since inference begins before it; "
                  "model.chat_template_kwargs='{enable_thinking: false}' may put it into the prompt"],
        "Qwen3, enable_thinking=false": [],
        "gpt-oss": ["<|channel|>final<|message|> in front of a response; it is scored, since inference "
                    "begins before it"],
        "Command-R": [],
    }  # fmt: skip
    for name, lines in told.items():
        notes = look_at_template(FORMATS[name].tokenizer(), FORMATS[name].kwargs).notes
        assert list(notes) == [f"the chat template writes {line}" for line in lines]


def test_reasoning_against_an_empty_block_in_the_generation_prompt() -> None:
    """Where thinking is off, a side that thinks does not stand behind that prompt; both sides then begin
    where both texts do."""
    assert said("Qwen3, enable_thinking=false", "yes", "no") == ["yes<|im_end|>", "no<|im_end|>"]
    with pytest.raises(UserError, match="does not begin as the generation prompt ends"):
        said("Qwen3, enable_thinking=false", WHOLE, "no")


def test_reasoning_that_r1s_template_cuts_is_refused_with_what_is_lost_and_what_to_type() -> None:
    with pytest.raises(UserError) as caught:
        said("DeepSeek-R1", f"<think>\n{'abc ' * 30}\n</think>\n\nyes", "no")
    assert str(caught.value) == (
        "data: row 3 (counted from 0) cannot train: the chat template leaves out a part of the response (its "
        "reasoning, say); model.response=verbatim trains responses as they are written (it leaves out "
        f"{'<think>' + chr(10) + ('abc ' * 30)[:72]!r} and 57 characters more); mend it or type "
        "data.on_bad_row=drop"
    )


def test_of_rows_that_a_template_cuts_one_is_shown() -> None:
    tokenizer = FORMATS["DeepSeek-R1"].tokenizer()
    answers = ["yes", "abc</think>yes", "de</think>yes"]
    records = [read_record(chat("q1"), answer, "no", row) for row, answer in enumerate(answers)]
    data = tokenize_records(records, tokenizer, 512, None, "drop")
    assert [pair.row for pair in data.pairs] == [0]
    assert list(data.notes.values()) == [
        "the chat template ends its generation prompt with <think>, and leaves that out where it writes a "
        "response, which is trained so; model.response=verbatim puts responses behind it",
        "row 1 (counted from 0), for one: the chat template leaves out a part of the response (its "
        "reasoning, say); model.response=verbatim trains responses as they are written; it leaves out "
        "'abc</think>'",
    ]
    [(reason, rows)] = data.dropped.items()
    assert (reason[:53], rows) == ("the chat template leaves out a part of the response (", [1, 2])


@pytest.mark.parametrize(
    ("given", "scored"),
    [
        ("<think>\nabc\n</think>\n\nyes", "abc\n</think>\n\nyes<|end_of_sentence|>"),
        ("abc</think>yes", "abc</think>yes<|end_of_sentence|>"),
        ("abc</think>yes<|end_of_sentence|>\n", "abc</think>yes<|end_of_sentence|>"),
        ({"content": "yes", "reasoning_content": "abc"}, "abc\n</think>\n\nyes<|end_of_sentence|>"),
        ({"content": "yes", "thinking": "abc\n"}, "abc\n</think>\n\nyes<|end_of_sentence|>"),
    ],
)
def test_a_verbatim_response_stands_behind_the_generation_prompt(given: Any, scored: str) -> None:
    """R1's opens the block, which an answer then closes; its end is the template's, once."""
    assert said("DeepSeek-R1", given, "d</think>no", "verbatim") == [scored, "d</think>no<|end_of_sentence|>"]
    assert prompt_end("DeepSeek-R1", "verbatim").endswith("q1<|Assistant|><think>\n")


def test_verbatim_where_the_generation_prompt_opens_nothing() -> None:
    assert said("Qwen3", "<think>a</think>yes", "no", "verbatim") == [
        "<think>a</think>yes<|im_end|>",
        "no<|im_end|>",
    ]
    assert said("gpt-oss", "<|channel|>final<|message|>yes<|return|>", "no", "verbatim") == [
        "<|channel|>final<|message|>yes<|return|>",
        "no<|return|>",
    ]


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("DeepSeek-R1", "yes", "opens <think>, and a response does not close it; write "),
        ("Qwen3", {"content": "yes", "thinking": "a"}, "writes content alone; write the reasoning into it"),
        ("Qwen3", {"content": "", "tool_calls": [{"function": {"name": "f"}}]}, "writes no tool calls; "),
    ],
)  # fmt: skip
def test_what_verbatim_cannot_write_is_refused(name: str, given: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        said(name, given, "b</think>no", "verbatim")


CALL = {"content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}


@pytest.mark.parametrize("key", ["thinking", "reasoning_content"])
def test_channels_of_gpt_oss_are_scored(key: str) -> None:
    """The model writes its channels; a call of a tool ends with a token of its own, which ends generation
    too. What it thinks reaches the template under either name."""
    analysis = "<|channel|>analysis<|message|>abc<|end|>"
    assert said("gpt-oss", {"content": "yes", key: "abc"}, CALL) == [
        f"{analysis}<|start|>assistant<|channel|>final<|message|>yes<|return|>",
        " to=functions.add<|channel|>commentary json<|message|>{}<|call|>",
    ]


@pytest.mark.parametrize("given", [WHOLE, "abc</think>yes"])
def test_reasoning_in_content_goes_where_the_template_writes_it(given: str) -> None:
    """gpt-oss's would write the tags into the answer, other templates an empty block in front of them. A
    template that writes reasoning as the content has it is left alone."""
    assert said("gpt-oss", given, "no") == [
        "<|channel|>analysis<|message|>abc<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>",
        "<|channel|>final<|message|>no<|return|>",
    ]
    assert said("Qwen3, inline unread", given, "no") == [
        "abc\n</think>\n\nyes<|im_end|>",
        "\n</think>\n\nno<|im_end|>",
    ]
    assert said("Qwen2.5", given, "no") == [f"{given}<|im_end|>", "no<|im_end|>"]


def test_arguments_of_calls_are_text_where_the_template_wants_text() -> None:
    """DeepSeek's adds them to text; others write an object as JSON."""
    tokenizer = make_bpe()
    write = "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] + c['function']['arguments'] }}"
    tokenizer.chat_template = (
        TURNS.replace("+ '<|end|>", "}}" + write + "{% endfor %}{{ '<|end|>") + GENERATION
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"d": 4}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    record = read_record(chat("a"), [answer], chat("a", "no")[1:], 0)
    pair = tokenize_records([record], tokenizer, 512, None, "error").pairs[0]
    assert tokenizer.decode(response_of(pair.chosen)) == 'add{"d": 4}<|end|>'


def test_what_was_thought_before_a_tool_call_stands_in_the_prompt_as_at_inference() -> None:
    """Where the call is answered, gpt-oss's template cuts it; inference, which writes that answer, has it."""
    tokenizer = FORMATS["gpt-oss"].tokenizer()
    turns = [*chat("q1"), {"role": "assistant", **CALL, "thinking": "abc"}, {"role": "tool", "content": "4"}]
    answer = {"role": "assistant", "content": "yes", "thinking": "d"}
    pair = tokenize_records(
        [read_record(turns, [answer], [{"role": "assistant", **CALL}], 0)], tokenizer, 512, None, "error"
    ).pairs[0]
    assert "abc" not in tokenizer.apply_chat_template([*turns, answer], tokenize=False)
    assert tokenizer.decode(prompt_of(pair.chosen)) == tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    assert "analysis<|message|>abc<|end|>" in tokenizer.decode(prompt_of(pair.chosen))
    assert [tokenizer.decode(response_of(side)) for side in sides_of(pair)] == [
        "<|channel|>analysis<|message|>d<|end|><|start|>assistant<|channel|>final<|message|>yes<|return|>",
        " to=functions.add<|channel|>commentary json<|message|>{}<|call|>",
    ]


def test_reasoning_of_earlier_turns_is_cut_from_the_prompt_as_at_inference() -> None:
    tokenizer = FORMATS["Qwen3"].tokenizer()
    record = read_record(chat("q1", WHOLE, "q2"), "de</think>no", "yes", 0)
    pair = tokenize_records([record], tokenizer, 512, None, "error").pairs[0]
    assert tokenizer.decode(prompt_of(pair.chosen)) == (
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(response_of(pair.chosen)) == "<think>\nde\n</think>\n\nno<|im_end|>"


def test_a_prompt_that_an_answer_changes_is_refused() -> None:
    """Here the template numbers the turns that it was given."""
    tokenizer = make_bpe()
    tokenizer.chat_template = "{{ messages | length }}" + TURNS + GENERATION
    with pytest.raises(UserError, match="renders its prompt in another way once it is answered"):
        tokenize_records([read_record(chat("a", "b", "c"), "d", "e", 0)], tokenizer, 512, None, "error")


# Tools and documents


def test_documents_and_tools_reach_the_template_and_what_it_does_not_write_is_counted() -> None:
    tokenizer = make_bpe()
    write = "{% for d in documents or [] %}{{ d['title'] + ': ' + d['text'] + '\n' }}{% endfor %}"
    tokenizer.chat_template = write + TURNS + GENERATION
    given = [{"title": "q1", "text": "blue"}]
    records = [
        read_record(chat("a"), "b", "c", 0, documents=given, tools=[{"name": "f"}]),
        read_record(chat("a"), "b", "c", 1),
        read_record("a", " b", " c", 2, documents=json.dumps(given)),
    ]
    data = tokenize_records(records, tokenizer, 512, None, "error")
    shown = [tokenizer.decode(prompt_of(pair.chosen)) for pair in data.pairs]
    assert [text.startswith("q1: blue\n<|turn|>user") for text in shown] == [True, False, False]
    assert list(data.notes.values())[2:] == [
        "1 rows have tools, which the chat template does not write",
        "1 rows have documents, for which plain text has no place",
    ]


@pytest.mark.parametrize("given", ["q1", ["q1"], {"title": "q1"}])
def test_documents_are_a_list_of_mappings(given: Any) -> None:
    with pytest.raises(BadRowError, match="documents "):
        read_record(chat("a"), "b", "c", 0, documents=given)
