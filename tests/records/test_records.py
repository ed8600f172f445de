"""Rows to records: TRL's formats, UltraFeedback's and raw HH-RLHF strings, and every reason that a row is
unfit."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from rcpo.records.record import BadRowError, read_record


def turns(*contents: str) -> list[dict[str, str]]:
    """user, assistant, user, ... in turn."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


SYSTEM = {"role": "system", "content": "Be brief."}

FORMATS: dict[str, tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]] = {
    "text, explicit prompt": (("Sky is", " blue", " green"), ("Sky is", " blue", " green")),
    "text, implicit prompt": (
        (None, "The sky is blue.", "The sky is green."),
        ("The sky is", " blue.", " green."),
    ),
    "text, implicit prompt ends before a word": (
        (None, "The sky is blue", "The sky is black"),
        ("The sky is", " blue", " black"),
    ),
    "text, implicit prompt, one side goes on": (
        (None, "We go home", "We go home now"),
        ("We go", " home", " home now"),
    ),
    "messages, explicit prompt": (
        (turns("Hi"), answer("Yes"), answer("No")),
        (turns("Hi"), answer("Yes"), answer("No")),
    ),
    "messages, implicit prompt": (
        (None, turns("Hi", "Yes"), turns("Hi", "No")),
        (turns("Hi"), answer("Yes"), answer("No")),
    ),
    "messages, several turns and a system prompt": (
        (None, [SYSTEM, *turns("a", "b", "c", "Yes")], [SYSTEM, *turns("a", "b", "c", "No")]),
        ([SYSTEM, *turns("a", "b", "c")], answer("Yes"), answer("No")),
    ),
    "text prompt, one assistant turn a side": (
        ("Hi", answer("Yes"), answer("No")),
        (turns("Hi"), answer("Yes"), answer("No")),
    ),
    "UltraFeedback: text prompt, whole conversations": (
        ("Hi", turns("Hi", "Yes"), turns("Hi", "No")),
        (turns("Hi"), answer("Yes"), answer("No")),
    ),
    "messages prompt, text sides": ((turns("Hi"), "Yes", "No"), (turns("Hi"), answer("Yes"), answer("No"))),
    "messages prompt, whole conversations": (
        (turns("Hi"), turns("Hi", "Yes"), turns("Hi", "No")),
        (turns("Hi"), answer("Yes"), answer("No")),
    ),
    "raw HH-RLHF": (
        (None, "\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No "),
        (turns("Hi"), answer("Yes"), answer("No")),
    ),
    "raw HH-RLHF of three turns with blank lines in them": (
        (
            None,
            "\n\nHuman: Hi\n\nAssistant: A:\n\nb\n\nHuman: c\n\nAssistant: Yes\n\nreally",
            "\n\nHuman: Hi\n\nAssistant: A:\n\nb\n\nHuman: c\n\nAssistant: No",
        ),
        (turns("Hi", "A:\n\nb", "c"), answer("Yes\n\nreally"), answer("No")),
    ),
    "text with a prompt column is never taken for HH-RLHF": (
        ("x", "\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No"),
        ("x", "\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No"),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_become_prompt_and_responses(name: str) -> None:
    source, expected = FORMATS[name]
    record = read_record(*source, row=7)
    assert (record.prompt, record.chosen, record.rejected, record.row) == (*expected, 7)


def test_what_no_template_renders_is_not_kept() -> None:
    """UltraFeedback's messages carry more, and null where there is no tool call."""
    extra = {"id": 3, "tool_calls": None}
    record = read_record(
        [{**turns("Hi")[0], **extra}], [{**answer("Yes")[0], **extra}], [{**answer("No")[0], **extra}], 0
    )
    assert (record.prompt, record.chosen, record.rejected) == (turns("Hi"), answer("Yes"), answer("No"))


UNFIT: dict[str, tuple[tuple[Any, Any, Any], str]] = {
    "null chosen": (("a", None, "b"), "chosen is null"),
    "null rejected": (("a", "b", None), "rejected is null"),
    "number": (("a", 3, "b"), "chosen is int, neither text nor messages"),
    "number as prompt": ((3.5, "a", "b"), "prompt is float, neither text nor messages"),
    "no messages": ((turns("a"), [], answer("b")), "chosen is empty"),
    "messages of text": (
        (turns("a"), ["x"], answer("b")),
        "chosen has a message without role and content",
    ),
    "message without content": (
        (turns("a"), [{"role": "assistant"}], answer("b")),
        "chosen has a message without role and content",
    ),
    "unknown role": (
        ([{"role": "human", "content": "a"}], answer("b"), answer("c")),
        "prompt has the role 'human'; roles are system, developer, user, assistant, tool",
    ),
    "null content": (
        (turns("a"), answer("b"), [{"role": "assistant", "content": None}]),
        "rejected has a message whose content is not text",
    ),
    "mixed sides": ((turns("a"), "b", answer("c")), "one side is text, the other messages"),
    "identical text": (("a", "b", "b"), "the sides are identical"),
    "identical text without prompt": ((None, "a b", "a b"), "the sides are identical"),
    "identical messages": ((None, turns("a", "b"), turns("a", "b")), "the sides are identical"),
    "blank chosen": (("a", " \n", "b"), "chosen is empty"),
    "blank rejected": ((turns("a"), answer("b"), answer("")), "rejected is empty"),
    "empty HH-RLHF answer": (
        (None, "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: No"),
        "chosen is empty",
    ),
    "blank prompt": ((" ", "a", "b"), "the prompt is empty"),
    "blank prompt message": ((turns(" "), answer("a"), answer("b")), "the prompt is empty"),
    "nothing in common": (
        (None, "Yes it is", "No way"),
        "there is no prompt, and no words that both sides begin with",
    ),
    "only a part of a word in common": (
        (None, "blue", "black"),
        "there is no prompt, and no words that both sides begin with",
    ),
    "no turn before the response": (
        (None, answer("a"), answer("b")),
        "there is neither a prompt column nor a turn before the response",
    ),
    "response of the user": (
        (turns("a"), turns("b"), answer("c")),
        "chosen ends with a turn of the role user, not assistant",
    ),
    "prompts differ": (
        (None, turns("a", "Yes"), turns("b", "No")),
        "the sides do not share one prompt before their last assistant turn",
    ),
    "HH-RLHF that parts ways earlier": (
        (
            None,
            "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: Hi\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
        ),
        "the sides do not share one prompt before their last assistant turn",
    ),
    "HH-RLHF on one side only": (
        (None, "\n\nHuman: Hi\n\nAssistant: a", "Hello"),
        'rejected does not begin with "\\n\\nHuman:" as the other side does',
    ),
    "prompt messages of another conversation": (
        (turns("x"), turns("a", "Yes"), turns("a", "No")),
        "the prompt is not the beginning of the sides' conversation",
    ),
    "prompt text of another conversation": (
        ("x", turns("a", "Yes"), turns("a", "No")),
        "the prompt is not in the sides' conversation",
    ),
    "prompt that ends with an answer": (
        (turns("a", "b"), answer("c"), answer("d")),
        "the prompt ends with a turn of the role assistant, not user",
    ),
    "late system turn": (
        ([*turns("a", "b"), SYSTEM, *turns("c")], answer("d"), answer("e")),
        "the prompt has a system turn that is not its first",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_rows_are_refused_with_their_reason(name: str) -> None:
    row, reason = UNFIT[name]
    with pytest.raises(BadRowError) as caught:
        read_record(*row, row=0)
    assert str(caught.value) == reason


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_tool_calls_tool_turns_and_reasoning_are_kept_for_the_template() -> None:
    """Arguments as JSON text, as OpenAI writes them, become an object; content may be null beside a call."""
    as_text = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    prompt = [
        *turns("Hi"),
        {"role": "assistant", "content": None, "tool_calls": [as_text]},
        {"role": "tool", "content": "2", "tool_call_id": "x", "name": "add"},
    ]
    chosen = [{"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}]
    rejected = [{"role": "assistant", "tool_calls": [CALL]}]
    record = read_record(prompt, chosen, rejected, 0, tools='[{"name": "add"}]', template_kwargs={"x": 1})
    assert record.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert record.prompt[2] == {"role": "tool", "content": "2", "name": "add", "tool_call_id": "x"}
    assert record.chosen == chosen
    assert record.rejected == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert (record.tools, record.template_kwargs) == ([{"name": "add"}], {"x": 1})


def test_content_in_text_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "Yes, "}, {"type": "text", "text": "it is."}]
    record = read_record(turns("Hi"), [{"role": "assistant", "content": parts}], answer("No"), 0)
    assert record.chosen == answer("Yes, it is.")
    parts[1] = {"type": "image", "url": "x"}
    with pytest.raises(BadRowError, match="chosen has a message with a part of the type image"):
        read_record(turns("Hi"), [{"role": "assistant", "content": parts}], answer("No"), 0)


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_messages_written_as_text_are_messages(write: Callable[[Any], str]) -> None:
    """As pandas and `datasets` write them into CSV, and as JSON in a column of text."""
    record = read_record(write(turns('It\'s "so"')), write(answer("Yes")), write(answer("No")), 0)
    assert (record.prompt, record.chosen) == (turns('It\'s "so"'), answer("Yes"))


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_a_message_alone_and_other_keys_first_are_read_too(write: Callable[[Any], str]) -> None:
    """And what belongs to the template. An answer that is JSON and no message stays text."""
    named = [{"name": "Ada", "role": "user", "content": "Hi"}]
    sides = [write({"from": "gpt", "value": "Yes"}), write(answer("No")[0])]
    tools, kwargs = [{"name": "add", "strict": None}], {"x": True}
    record = read_record(write(named), *sides, 0, tools=write(tools), template_kwargs=write(kwargs))
    assert record.prompt == [{"role": "user", "content": "Hi", "name": "Ada"}]
    assert (record.chosen, record.rejected) == (answer("Yes"), answer("No"))
    assert (record.tools, record.template_kwargs) == (tools, kwargs)
    for found in (
        {"role": "admin", "content": "a"},
        {"from": "Rome", "to": "Oslo"},
        {"value": 3},
        [{"a": 1}],
    ):
        assert read_record("q", write(found), "b", 0).chosen == write(found)
    assert read_record(turns("Hi"), answer("a"), answer("b"), 0, tools="").tools is None
    with pytest.raises(BadRowError, match="tools is text, and not JSON"):
        read_record(turns("Hi"), answer("a"), answer("b"), 0, tools="add")


def test_text_that_looks_like_messages_and_is_none_is_refused() -> None:
    """numpy's way of writing them leaves the commas out."""
    broken = "[{'role': 'assistant', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"
    with pytest.raises(BadRowError, match="chosen looks like messages written as text, and cannot be read"):
        read_record("q", broken, "b", 0)
    assert read_record("q", "[{x", "[{1: 2}]", 0).chosen == "[{x"
