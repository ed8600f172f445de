"""The shapes that public pairs come in: each is read as what it is, or refused with the words to type; and
text as chat."""

import json
from pathlib import Path
from typing import Any

import pytest

from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.records.load import NOTE, load_records, note_on_text
from rcpo.records.record import PreferenceRecord


def load(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> tuple[list[PreferenceRecord], list[str]]:
    """All records in the file's order, and the notes for the console without the file's name. The second of
    two equal rows is turned round, since a pair that is held out is not trained on."""
    path = tmp_path / "a.jsonl"
    if rows[0] == rows[-1] and "chosen" in rows[0]:
        rows = [rows[0], {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_records(DataConfig(source="file", path=str(path), eval_pairs=1, **keys))
    notes = [line.removeprefix(f"{NOTE}{path}: ") for line in data.report if line.startswith(NOTE)]
    return sorted([*data.train, *data.held_out], key=lambda record: record.row), notes


def parts(record: PreferenceRecord) -> tuple[Any, Any, Any]:
    return record.prompt, record.chosen, record.rejected


def fault(tmp_path: Path, row: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, [row, row], **{"on_bad_row": "drop", **keys})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def answers(chosen: str, rejected: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [turn("assistant", chosen)], [turn("assistant", rejected)]


SIDES = {"chosen": "Yes it is", "rejected": "Yes or no"}


def test_alpacas_instruction_and_input_are_the_prompt(tmp_path: Path) -> None:
    """Not what both answers begin with. An empty input adds nothing."""
    rows = [
        {"instruction": "Translate.", "input": "Katze", **SIDES},
        {"instruction": "Count.", "input": "", **SIDES},
        {"instruction": "Sum.", "input": None, **SIDES},
    ]
    records, notes = load(tmp_path, rows)
    assert [parts(record) for record in records] == [
        (prompt, "Yes it is", "Yes or no") for prompt in ("Translate.\n\nKatze", "Count.", "Sum.")
    ]
    assert notes == ["in 3 rows, the prompt is instruction, a blank line and input"]


def test_llama_factorys_system_and_history_are_turns(tmp_path: Path) -> None:
    """One row that has them makes all rows of the file messages."""
    rows = [
        {"instruction": "c", "input": "", "system": "Be brief.", "history": [["a", "b"]], **SIDES},
        {"instruction": "d", "input": "e", "system": "", "history": [], **SIDES},
    ]
    records, notes = load(tmp_path, rows)
    assert [parts(record) for record in records] == [
        (
            [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
            *answers("Yes it is", "Yes or no"),
        ),
        ([turn("user", "d\n\ne")], *answers("Yes it is", "Yes or no")),
    ]
    assert notes == [
        "in 2 rows, the prompt is instruction, a blank line and input; system is the system turn (1 rows); "
        "history is the turns before the prompt (1 rows)"
    ]


def test_a_system_column_has_no_place_in_plain_text(tmp_path: Path) -> None:
    row = {"question": "q", "system": "Be brief.", **SIDES}
    records, notes = load(tmp_path, [row, row])
    assert records[0].prompt == [turn("system", "Be brief."), turn("user", "q")]
    assert notes[0] == "in 2 rows, the prompt is question; system is the system turn (2 rows)"
    records, notes = load(tmp_path, [row, row], as_chat=False)
    assert parts(records[0]) == ("q", "Yes it is", "Yes or no")
    assert notes == ["in 2 rows, the prompt is question", "columns that are not used: system"]


@pytest.mark.parametrize("name", ["question", "query", "instruction", "input"])
def test_a_prompt_by_another_name_is_read_and_said(tmp_path: Path, name: str) -> None:
    records, notes = load(tmp_path, [{name: "q", "note": 1, **SIDES}] * 2)
    assert parts(records[0]) == ("q", "Yes it is", "Yes or no")
    assert notes == [f"in 2 rows, the prompt is {name}", "columns that are not used: note"]


def test_data_columns_overrule_what_a_shape_would_be(tmp_path: Path) -> None:
    row = {"instruction": "a", "input": "b", "system": "c", **SIDES}
    records, notes = load(tmp_path, [row] * 2, columns={"prompt": "input"})
    assert parts(records[0]) == ("b", "Yes it is", "Yes or no")
    assert notes == ["columns that are not used: instruction, system"]
    records, notes = load(tmp_path, [row] * 2, columns={"chosen": "chosen"})
    assert parts(records[0]) == ("Yes", " it is", " or no")
    assert notes == [
        "columns that are not used: instruction, input, system",
        "no column is the prompt; in 2 rows it is what both sides begin with",
    ]


def said(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def test_sharegpt_pairs_are_conversations_and_two_messages(tmp_path: Path) -> None:
    row = {
        "conversations": [said("human", "a"), said("gpt", "b"), said("human", "c")],
        "chosen": said("gpt", "Yes"),
        "rejected": said("gpt", "No"),
        "system": "Be brief.",
    }
    expected = [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    records, notes = load(tmp_path, [row] * 2)
    assert parts(records[0]) == (expected, *answers("Yes", "No"))
    assert notes == [
        "in 2 rows, the prompt is conversations; system is the system turn (2 rows); from and value of "
        "messages are role and content (2 rows)"
    ]


def test_sharegpt_tool_turns_reach_the_template(tmp_path: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    row = {
        "conversations": [
            said("system", "s"), said("human", "1 + 1?"), said("function_call", json.dumps(call)),
            said("observation", "2"),
        ],
        "chosen": said("gpt", "Two"),
        "rejected": said("function_call", json.dumps([call])),
        "tools": json.dumps([{"name": "add"}]),
    }  # fmt: skip
    (record, _), _ = load(tmp_path, [row] * 2)
    called = {**turn("assistant", ""), "tool_calls": [{"type": "function", "function": call}]}
    assert record.prompt == [turn("system", "s"), turn("user", "1 + 1?"), called, turn("tool", "2")]
    assert (record.rejected, record.tools) == ([called], [{"name": "add"}])
    row["rejected"] = said("function_call", "add 1 and 1")
    assert "rejected has a function_call that is not JSON with name and arguments" in fault(tmp_path, row)


def test_openai_messages_with_two_single_answers(tmp_path: Path) -> None:
    row = {
        "messages": [turn("user", "a")],
        "chosen": turn("assistant", "Yes"),
        "rejected": turn("assistant", "No"),
    }
    records, notes = load(tmp_path, [row] * 2)
    assert parts(records[0]) == ([turn("user", "a")], *answers("Yes", "No"))
    assert notes == ["in 2 rows, the prompt is messages"]


@pytest.mark.parametrize("as_python", [False, True])
def test_from_and_value_in_whole_conversations_and_in_text(tmp_path: Path, as_python: bool) -> None:
    sides = {name: [said("human", "a"), said("gpt", name)] for name in ("chosen", "rejected")}
    row = {name: str(side) if as_python else side for name, side in sides.items()}
    records, notes = load(tmp_path, [row] * 2)
    assert parts(records[0]) == ([turn("user", "a")], *answers("chosen", "rejected"))
    assert notes == ["in 2 rows, from and value of messages are role and content (2 rows)"]


def test_ultrafeedbacks_scores_and_messages_are_named_as_not_used(tmp_path: Path) -> None:
    sides = {name: [turn("user", "q"), turn("assistant", name)] for name in ("chosen", "rejected")}
    row = {"prompt": "q", "prompt_id": "x", **sides, "messages": sides["chosen"], "score_chosen": 8.0}
    records, notes = load(tmp_path, [row] * 2)
    assert parts(records[0]) == ([turn("user", "q")], *answers("chosen", "rejected"))
    assert notes == ["columns that are not used: prompt_id, messages, score_chosen"]


def test_safe_rlhfs_better_response_is_chosen(tmp_path: Path) -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 0}
    rows = [{**row, "better_response_id": better} for better in (0, 1)]
    records, notes = load(tmp_path, rows)
    assert [parts(record) for record in records] == [("q", "a", "b"), ("q", "b", "a")]
    assert notes == [
        "in 2 rows, chosen is the one of response_0 and response_1 that better_response_id prefers",
        "columns that are not used: safer_response_id",
    ]
    assert "better_response_id prefers neither)" in fault(tmp_path, {**row, "better_response_id": None})


def test_shps_preferred_comment_is_chosen(tmp_path: Path) -> None:
    """labels is 1 where A is preferred; the post is in history."""
    rows = [{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": label} for label in (1, 0)]
    records, notes = load(tmp_path, rows)
    assert [parts(record) for record in records] == [("q", "a", "b"), ("q", "b", "a")]
    assert notes == [
        "in 2 rows, the prompt is history; chosen is the one of human_ref_A and human_ref_B that labels "
        "prefers"
    ]


def test_the_arenas_winner_is_chosen_and_ties_are_dropped(tmp_path: Path) -> None:
    sides = {f"conversation_{name}": [turn("user", "q"), turn("assistant", name)] for name in "ab"}
    rows = [{**sides, "winner": winner} for winner in ("model_a", "model_b", "tie", "tie (bothbad)")]
    records, _ = load(tmp_path, rows, on_bad_row="drop")
    assert [record.chosen[0]["content"] for record in records if isinstance(record.chosen, list)] == [
        "a",
        "b",
    ]


NAMED = {
    "stack-exchange": (("question", "response_j", "response_k"), "prompt: question, "),
    "argilla": (("instruction", "chosen_response", "rejected_response"), "prompt: instruction, "),
    "no prompt": (("note", "good", "bad"), ""),
}


@pytest.mark.parametrize("name", NAMED)
def test_names_of_the_sides_elsewhere_are_the_words_to_type(tmp_path: Path, name: str) -> None:
    (prompt, chosen, rejected), first = NAMED[name]
    said = fault(tmp_path, {prompt: "q", chosen: "Yes it is", rejected: "Yes or no"})
    words = f"{{{first}chosen: {chosen}, rejected: {rejected}}}"
    assert said.endswith(
        f"has no column chosen and no column rejected, but {prompt}, {chosen}, {rejected}; "
        f"type data.columns='{words}'"
    )


COMPLETION = {"response": "a", "overall_score": 8}
NO_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "UltraFeedback": (
        {"source": "x", "instruction": "q", "models": ["m"], "completions": [COMPLETION]},
        "several scored completions a row (UltraFeedback's first form; data=ultrafeedback reads the "
        "binarised one)",
    ),
    "Nectar": ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}]}, "several ranked answers a row"),
    "lists": ({"prompt": "q", "responses": ["a", "b"]}, "lists of responses without scores or ranks"),
    "KTO, ShareGPT": (
        {"conversations": [said("human", "a")], "label": True},
        "single conversations with a label (KTO's form)",
    ),
    "Alpaca": (
        {"instruction": "q", "input": "", "output": "a"},
        "one answer a row (objective=sft trains on such; type "
        "data.columns='{prompt: instruction, completion: output}')",
    ),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_what_is_no_pairs_is_called_so(tmp_path: Path, name: str) -> None:
    row, kind = NO_PAIRS[name]
    assert fault(tmp_path, row).endswith(
        f"has no column chosen and no column rejected, but {', '.join(row)}; these are {kind} and no pairs; "
        "write two answers to one prompt a row (prompt, chosen, rejected), or several (prompt, responses, "
        "scores)"
    )


def test_a_conversation_is_a_chosen_answer_that_goes_on(tmp_path: Path) -> None:
    """Messages or ShareGPT's turns, a column of system turns in front; of one answer the record is that of
    its prompt and completion."""
    turns = [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "b")]
    other = [turn("user", "z"), turn("assistant", "y")]
    shared = [said("human", "q"), said("gpt", "a"), said("human", "r"), said("gpt", "b")]
    for row in ({"messages": turns}, {"conversations": shared}, {"turns": turns}):
        columns = {"messages": "turns"} if "turns" in row else None
        (record, _), notes = load(tmp_path, [row, dict.fromkeys(row, other)], columns=columns)
        assert (record.label, *parts(record)) == (True, turns[:1], turns[1:], turns[1:])
        assert any("whole conversation a row" in note for note in notes) == (columns is None)
    rows = [{"conversations": each, "system": "s"} for each in (shared, other)]
    (record, _), notes = load(tmp_path, rows)
    assert record.prompt == [turn("system", "s"), turn("user", "q")]
    assert any("system is the system turn (2 rows)" in note for note in notes)
    pairs = [(turns[:1], turns[1:2]), (other[:1], other[1:])]
    (alone, _), _ = load(tmp_path, [{"messages": prompt + answer} for prompt, answer in pairs])
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    (completed, _), notes = load(tmp_path, rows)
    assert parts(alone) == parts(completed)
    assert any("a chosen one, since there is no label" in note for note in notes)


def test_a_single_answer_has_a_label(tmp_path: Path) -> None:
    """TRL's format for KTO: true or 1 is a chosen answer. It stands on both sides, for the tokenizer."""
    labels = [True, 0, 1.0, "false"]
    rows = [{"prompt": "q", "completion": f"a{n}", "label": label} for n, label in enumerate(labels)]
    bad = {"prompt": "q", "completion": "a", "label": 2}
    records, said = load(tmp_path, [*rows, bad], on_bad_row="drop")
    assert [record.label for record in records] == [True, False, True, False]
    assert parts(records[1]) == ("q", "a1", "a1")
    assert any("completion is one answer, chosen where label is true" in line for line in said)
    named = [{"ask": "q", "answer": "a", "good": n} for n in (0, 1)]
    columns = {"prompt": "ask", "completion": "answer", "label": "good"}
    assert [record.label for record in load(tmp_path, named, columns=columns)[0]] == [False, True]


def test_text_as_chat_is_a_user_turn_and_assistant_turns(tmp_path: Path) -> None:
    """White space at the joint of prompt and response is left out, all other is kept."""
    row = {"prompt": " a\n", "chosen": " Yes \n", "rejected": "\nNo"}
    records, _ = load(tmp_path, [row] * 2, as_chat=True)
    assert parts(records[0]) == ([turn("user", " a")], *answers("Yes \n", "No"))
    for as_chat in (None, False):
        records, _ = load(tmp_path, [row] * 2, as_chat=as_chat)
        assert parts(records[0]) == (" a\n", " Yes \n", "\nNo")


def test_as_chat_needs_a_prompt_and_leaves_messages_alone(tmp_path: Path) -> None:
    assert "data.as_chat=true needs a prompt of its own, and the sides only begin alike)" in fault(
        tmp_path, SIDES, as_chat=True
    )
    row = {name: f"\n\nHuman: Hi\n\nAssistant: {name}" for name in SIDES}
    records, _ = load(tmp_path, [row] * 2, as_chat=True)
    assert parts(records[0]) == ([turn("user", "Hi")], *answers("chosen", "rejected"))
    only_spaces_differ = {"prompt": "a", "chosen": " b", "rejected": "b"}
    assert "(the sides are identical)" in fault(tmp_path, only_spaces_differ, as_chat=True)


@pytest.mark.parametrize(("as_chat", "is_said"), [(None, True), (False, False), (True, False)])
def test_text_under_a_template_is_said_once(tmp_path: Path, as_chat: bool | None, is_said: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, **SIDES}) + "\n" for prompt in "abc"))
    config = DataConfig(source="file", path=str(path), eval_pairs=1, as_chat=as_chat)
    expected = [
        f"{NOTE}3 pairs are plain text, and are trained without the chat template that the model has; type "
        "data.as_chat=true to render them with it, or data.as_chat=false to say that this is meant"
    ]
    assert note_on_text(load_records(config), config) == (expected if is_said else [])
