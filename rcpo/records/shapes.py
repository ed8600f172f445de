"""The shapes that public pairs come in: which columns hold the prompt and the sides, where these are not
called prompt, chosen and rejected, and what to say of rows that are no pairs.

Looks at the names of columns and at what the first row has in them; data.columns overrules it. Does not judge
rows (`rcpo.records.record`). What was read as what is in `Shape.said`, for the console.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rcpo.records.conversations import MESSAGES
from rcpo.records.lists import LISTED
from rcpo.records.messages import num_sharegpt, parsed_quietly
from rcpo.records.readers import Rows
from rcpo.records.record import BadRowError, label_of


class Choice(NamedTuple):
    """Two answers and a column that says which of them is preferred."""

    answers: tuple[str, str]
    by: str
    sides: dict[Any, int]
    prompt: str | None = None
    """Its prompt, where that has a name of its own."""


CHOICES = (
    Choice(("response_0", "response_1"), "better_response_id", {0: 0, 1: 1}),  # PKU-SafeRLHF
    Choice(("human_ref_A", "human_ref_B"), "labels", {1: 0, 0: 1}, "history"),  # SHP
    Choice(("conversation_a", "conversation_b"), "winner", {"model_a": 0, "model_b": 1}),  # Chatbot Arena
)
PROMPTS = ("instruction", "question", "query", "input")
"""Columns that are the prompt of two answers beside them, the likeliest first; Alpaca's instruction goes on
in its input."""
CONVERSATIONS = ("conversations", "messages")
"""Turns before two single answers (ShareGPT, LLaMA-Factory)."""
SINGLE = ("completion", "label")
"""Columns of a single answer with its label (TRL's format for KTO); without a label it is a chosen one."""
COLUMNS = frozenset(
    [*PROMPTS, *SINGLE, *LISTED, *CONVERSATIONS, "system", "history"]
    + [name for choice in CHOICES for name in (*choice.answers, choice.by)]
)
"""All that a shape may read beside prompt, chosen and rejected."""

SIDES = {
    "chosen_response": "rejected_response", "response_chosen": "response_rejected",
    "chosen_answer": "rejected_answer", "answer_chosen": "answer_rejected", "response_j": "response_k",
    "preferred": "dispreferred", "better": "worse", "better_response": "worse_response", "good": "bad",
    "accepted": "rejected", "winner": "loser", "win": "lose", "positive": "negative", "pos": "neg",
    "response_w": "response_l", "y_w": "y_l",
}  # fmt: skip
"""Names of the two sides elsewhere, for advice."""
_NO_PAIRS = {
    ("completions", "instruction"): "several scored completions a row (UltraFeedback's first form; "
    "data=ultrafeedback reads the binarised one)",
    ("answers", "prompt"): "several ranked answers a row",
    ("responses", "prompt"): "lists of responses without scores or ranks",
    ("conversations", "label"): "single conversations with a label (KTO's form)",
    ("conversations", "kto_tag"): "single conversations with a label (KTO's form)",
    ("instruction", "output"): "one answer a row (objective=sft trains on such; type "
    "data.columns='{prompt: instruction, completion: output}')",
}
_WRITE_PAIRS = (
    "write two answers to one prompt a row (prompt, chosen, rejected), or several (prompt, responses, scores)"
)


@dataclass(frozen=True)
class Shape:
    """How a row of a source becomes prompt, chosen and rejected, and what else data.columns can name."""

    names: Mapping[str, str]
    """The column of each part, by rcpo's names or data.columns."""
    prompt: tuple[str, ...] = ()
    """Columns that are the prompt, joined by a blank line; none where it is in the sides."""
    system: str | None = None
    history: str | None = None
    choice: Choice | None = None
    said: tuple[str, ...] = ()
    """What is read in another way than by names alone, for the log and the console."""
    is_single: bool = False
    """Whether rows are single answers with a label, in the columns of `completion` and `label`."""
    is_list: bool = False
    """Whether rows are lists of responses, in the columns of `responses` and `scores` or `ranks`."""
    is_conversation: bool = False
    """Whether rows are whole conversations, in the column of `messages`."""

    def columns(self) -> set[str]:
        """Those that are read."""
        found = {*self.names.values(), *self.prompt, *filter(None, (self.system, self.history))}
        if self.is_single or self.is_list or self.is_conversation:
            found -= {self.names["chosen"], self.names["rejected"]}
        return found | ({*self.choice.answers, self.choice.by} if self.choice else set())

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of a row. Raises BadRowError where its columns contradict each other."""
        values = {part: row.get(name) for part, name in self.names.items()}
        if self.choice is not None:
            values["chosen"], values["rejected"] = _chosen(row, self.choice)
        if self.is_single:
            values["chosen"] = values["rejected"] = values["completion"]
            values["label"] = "label" not in self.names or label_of(values["label"])
        if self.is_conversation:
            if self.system is not None:
                values[MESSAGES] = self._conversation(row, values[MESSAGES])
            return values
        values["prompt"] = _joined([row.get(name) for name in self.prompt])
        if self.system is not None or self.history is not None:
            values["prompt"] = self._conversation(row, values["prompt"])
        return values

    def _conversation(self, row: Mapping[str, Any], prompt: Any) -> Any:
        """The prompt behind its system turn and the turns before it."""
        prompt = parsed_quietly(prompt)
        own = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(own, list):
            return prompt
        before = []
        system = row.get(self.system or "")
        has_own = bool(own) and isinstance(own[0], dict) and own[0].get("role") == "system"
        if system and not has_own:
            before.append({"role": "system", "content": system})
        for turn in row.get(self.history or "") or ():
            if not (isinstance(turn, list) and len(turn) == 2):
                raise BadRowError("history is no list of turns of two, question and answer")
            before += [
                {"role": role, "content": said}
                for role, said in zip(("user", "assistant"), turn, strict=True)
            ]
        return [*before, *own]


def own_shape(source: Rows, names: Mapping[str, str]) -> Shape:
    """Columns as they are called, or as data.columns says."""
    prompt = (names["prompt"],) if names["prompt"] in source.columns else ()
    if MESSAGES in names:
        return Shape(names, is_conversation=True)
    return Shape(names, prompt, is_single="completion" in names, is_list="responses" in names)


def without_absent_label(
    names: Mapping[str, str], columns: Iterable[str], named: Mapping[str, str]
) -> dict[str, str]:
    """The names without a label that no column is and nobody has named: all answers are chosen ones then."""
    is_there = names.get("label") in set(columns) or "label" in named
    return {part: name for part, name in names.items() if part != "label" or is_there}


def is_listed(columns: Iterable[str]) -> bool:
    """Whether these are the columns of lists of responses."""
    seen = set(columns)
    return "responses" in seen and bool({"scores", "ranks"} & seen)


def with_one_order(
    names: Mapping[str, str], columns: Iterable[str], named: Mapping[str, str]
) -> dict[str, str]:
    """The names without scores or without ranks, since a list is read by one of the two: by the one that is
    named, or that there is, else by scores."""
    has = {
        part: part in named or (not {"scores", "ranks"} & set(named) and names.get(part) in set(columns))
        for part in ("scores", "ranks")
    }
    other = "scores" if has["ranks"] and not has["scores"] else "ranks"
    return {part: name for part, name in names.items() if part != other}


def shape_of(source: Rows, names: Mapping[str, str], as_text: bool) -> Shape:
    """The shape of rows whose prompt and sides data.columns does not name. With `as_text` there are no turns,
    so that a column `system` has no place."""
    columns = list(map(str, source.columns))
    has_sides = {"chosen", "rejected"} <= set(columns)
    choice = next((each for each in CHOICES if {*each.answers, each.by} <= set(columns)), None)
    if has_sides:
        choice = None
    elif {"completion", "label"} <= set(columns):
        own = own_shape(source, {**names, **{name: name for name in SINGLE}})
        return replace(own, is_single=True, said=("completion is one answer, chosen where label is true",))
    elif {"prompt", "completion"} <= set(columns):
        own = own_shape(source, {**names, "completion": "completion"})
        return replace(own, said=("completion is one answer, a chosen one, since there is no label",))
    elif is_listed(columns):
        listed = {name: name for name in LISTED}
        return own_shape(source, with_one_order({**names, **listed}, columns, {}))
    elif choice is None:
        found = _conversation_column(columns)
        return own_shape(source, names) if found is None else _of_conversations(source, names, found, as_text)
    side = "chosen" if choice is None else choice.answers[0]
    first = next((row for row in source.rows if row.get(side) is not None), {})
    if not _is_answer(first.get(side)):  # whole conversations have their prompt in them
        prompt: tuple[str, ...] = ("prompt",) if "prompt" in columns else ()
        return Shape(names, prompt, choice=choice, said=tuple(_said_of(prompt, choice)))
    prompt = _prompt_columns(columns, first, choice)
    system = history = None
    if prompt and not as_text:
        system = "system" if _holds(source, "system", str) else None
        history = "history" if choice is None and _holds(source, "history", list) else None
    said = _said_of(prompt, choice)
    said += [
        f"{name} is {what} ({_num(source, name)} rows)"
        for name, what in ((system, "the system turn"), (history, "the turns before the prompt"))
        if name is not None
    ]
    return Shape(names, prompt, system, history, choice, tuple(said))


def _conversation_column(columns: Iterable[str]) -> str | None:
    """Of rows that have no answers beside it; None where a label judges it."""
    seen = set(columns)
    if {"label", "kto_tag"} & seen:
        return None
    return next((name for name in CONVERSATIONS if name in seen), None)


def _of_conversations(source: Rows, names: Mapping[str, str], column: str, as_text: bool) -> Shape:
    system = None if as_text or not _holds(source, "system", str) else "system"
    said = [f"{column} is a whole conversation a row, whose assistant turns are chosen answers"]
    if system is not None:
        said.append(f"system is the system turn ({_num(source, system)} rows)")
    return Shape({**names, MESSAGES: column}, system=system, said=tuple(said), is_conversation=True)


def read_as(source: Rows, shape: Shape) -> list[str]:
    """What is read in another way than by rcpo's own names, for the console; nothing where nothing is."""
    said, columns = list(shape.said), shape.columns()
    num = sum(num_sharegpt(row.get(name) for name in columns) > 0 for row in source.rows)
    if num:
        said.append(f"from and value of messages are role and content ({num} rows)")
    return [f"in {len(source.rows)} rows, {'; '.join(said)}"] if said else []


def _said_of(prompt: tuple[str, ...], choice: Choice | None) -> list[str]:
    said = [] if prompt in ((), ("prompt",)) else [f"the prompt is {', a blank line and '.join(prompt)}"]
    if choice is not None:
        said.append(f"chosen is the one of {' and '.join(choice.answers)} that {choice.by} prefers")
    return said


def _prompt_columns(columns: list[str], first: Mapping[str, Any], choice: Choice | None) -> tuple[str, ...]:
    if "prompt" in columns:
        return ("prompt",)
    if choice is not None and choice.prompt in columns:
        return (str(choice.prompt),)
    for name in CONVERSATIONS:
        if isinstance(parsed_quietly(first.get(name)), list):
            return (name,)
    if str(first.get("chosen", "")).startswith("\n\nHuman:"):  # HH-RLHF's strings have the prompt in them
        return ()
    found = next((name for name in PROMPTS if name in columns), None)
    if found == "instruction" and "input" in columns:
        return ("instruction", "input")
    return () if found is None else (found,)


def _is_answer(side: Any) -> bool:
    """Whether a side is one answer alone: text, a message, or a list of one."""
    side = parsed_quietly(side)
    return isinstance(side, str) or (isinstance(side, list) and len(side) == 1)


def _holds(source: Rows, name: str, kind: type) -> bool:
    """Whether a column has something, of this kind alone."""
    found = [value for row in source.rows if (value := row.get(name))]
    return bool(found) and all(isinstance(value, kind) for value in found)


def _num(source: Rows, name: str) -> int:
    return sum(bool(row.get(name)) for row in source.rows)


def _joined(parts: Iterable[Any]) -> Any:
    """Text parts with a blank line between them, empty ones left out; one that is no text as it is."""
    first, *others = list(parts) or [None]
    texts = [text for text in (first, *others) if isinstance(text, str) and text.strip()]
    return "\n\n".join(texts) if texts and others else first


def _chosen(row: Mapping[str, Any], choice: Choice) -> tuple[Any, Any]:
    label = row.get(choice.by)
    if label not in choice.sides:
        raise BadRowError(f"{choice.by} prefers neither")
    preferred = choice.sides[label]
    return row.get(choice.answers[preferred]), row.get(choice.answers[1 - preferred])


def advice(columns: Iterable[str]) -> str | None:
    """What to do with rows that lack chosen or rejected, where that is known: data.columns that fit, or why
    they are no pairs."""
    known = [str(name) for name in columns]
    for chosen, rejected in SIDES.items():
        if {chosen, rejected} <= set(known):
            prompt = next((name for name in ("prompt", *PROMPTS) if name in known), None)
            first = "" if prompt is None else f"prompt: {prompt}, "
            return f"type data.columns='{{{first}chosen: {chosen}, rejected: {rejected}}}'"
    kind = next((kind for names, kind in _NO_PAIRS.items() if set(names) <= set(known)), None)
    return None if kind is None else f"these are {kind} and no pairs; {_WRITE_PAIRS}"
