"""Answers to many prompts, turn by turn, kept as they come: `rcpo generate`.

Every answer is a line of OUT.partial, beside OUT, as soon as its batch is done. The same words go on from
there after a kill; OUT itself is written once, at the end, and replaces nothing before. Does not decode
(`rcpo.evaluation.decoding`) or say what a file looks like (`rcpo.evaluation.forms`)."""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.common.files import remove, write_atomically
from rcpo.common.locks import HeldError, hold
from rcpo.evaluation.decoding import Asked, Decoding, Writer, answer_all
from rcpo.evaluation.forms import Answered, Turn
from rcpo.evaluation.prompts import Asking, Prompt, answered
from rcpo.records.messages import Messages
from rcpo.records.record import BadRowError


class Which(NamedTuple):
    """One turn of one answer."""

    row: int
    answer: int
    turn: int


class Partial:
    """OUT.partial: a head that says what is generated, and a line an answer."""

    def __init__(self, out: Path, made_with: dict[str, Any], start_again: bool) -> None:
        """Raises UserError where there is one of other words, unless that is to `start_again`."""
        self.path = out.with_name(f"{out.name}.partial")
        self._lock = out.with_name(f"{out.name}.lock")
        self.turns: dict[Which, Turn] = {}
        self._head = json.dumps({"made_with": made_with}, sort_keys=True)
        head, *lines = self._whole_lines() or [self._head]
        if head != self._head:
            if not start_again:
                raise UserError(
                    f"out={out}: {self.path} was begun with other words, prompts or weights "
                    f"({_difference(head, made_with)}); type the same again to go on, or --overwrite"
                )
            lines = []
        for line in lines:
            row, answer, turn, *facts = json.loads(line)
            self.turns[Which(row, answer, turn)] = Turn(*facts)
        self._lines = [self._head, *lines]

    def _whole_lines(self) -> list[str]:
        """Without what a kill has left of the last one."""
        if not self.path.is_file():
            return []
        *lines, _ = self.path.read_text(encoding="utf-8").split("\n")
        return lines

    def num_kept(self) -> int:
        """Answers that are whole in the file; of those that were added last some may not be."""
        return max(0, len(self._whole_lines()) - 1)

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[str]]:
        """To write on, behind the whole lines. Raises UserError where another process does so now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with hold(self._lock):
                write_atomically(self.path, "".join(line + "\n" for line in self._lines))
                with self.path.open("a", encoding="utf-8") as stream:
                    yield stream
        except HeldError as error:
            raise UserError(
                f"{self.path}: is being written by {error}; give another out=FILE, or wait for it"
            ) from None

    def remove(self) -> None:
        """Once OUT is there."""
        remove(self.path)
        remove(self._lock)

    def add(self, stream: IO[str], which: Which, turn: Turn) -> None:
        """Raises OSError on a full disk."""
        self.turns[which] = turn
        line = json.dumps([*which, turn.text, turn.num_tokens, turn.is_finished], ensure_ascii=False)
        self._lines.append(line)
        stream.write(line + "\n")


def _difference(head: str, made_with: dict[str, Any]) -> str:
    try:
        before = json.loads(head)["made_with"]
        keys = [key for key in {**before, **made_with} if before.get(key) != made_with.get(key)]
    except (ValueError, KeyError, TypeError):
        return "it cannot be read"
    return "other " + ", ".join(sorted(keys))


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Of what is asked."""
    parts = [
        [prompt.opening, prompt.later, *(image.digest() for image in prompt.images)] for prompt in prompts
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def asked_first(asking: Asking, prompts: Sequence[Prompt], where: str, positions: int | None) -> list[Asked]:
    """Tokens and images of every prompt's first turn. Raises UserError with the row of one that the template
    refuses, whose image cannot be read, or that is longer than the model takes; `where` is what the user
    typed for the prompts."""
    found = []
    for number, prompt in enumerate(prompts):
        try:
            asked = asking.asked(asking.conversation(prompt), prompt.images)
        except BadRowError as error:
            raise UserError(
                f"{where}: row {number} (counted from 0): {error}; mend it or leave it out"
            ) from None
        if positions is not None and len(asked.ids) >= positions:
            raise UserError(
                f"{where}: row {number} (counted from 0) has {len(asked.ids)} tokens, and the model takes "
                f"{positions} with its answer; give a shorter one, or leave it out"
            )
        found.append(asked)
    return found


def generate(
    model: PreTrainedModel | Writer,
    asking: Asking,
    prompts: Sequence[Prompt],
    first: Sequence[Asked],
    decoding: Decoding,
    num_answers: int,
    seed: int,
    partial: Partial,
    on_answers: Callable[[int], None] = lambda num: None,
) -> list[Answered]:
    """All answers, those that `partial` has taken from there. Raises UserError where the disk is full; what
    was generated stays."""
    openings = [asking.conversation(prompt) for prompt in prompts]
    asked: dict[tuple[int, int], str | Messages] = {}
    occurrences = _occurrences(first)
    with _said_if_full(partial), partial.open() as stream:
        for turn in range(max(len(prompt.later) for prompt in prompts) + 1):
            whiches, batch = [], []
            for row, prompt in enumerate(prompts):
                for answer in range(num_answers if turn <= len(prompt.later) else 0):
                    if turn:
                        before = partial.turns[Which(row, answer, turn - 1)].text
                        asked[row, answer] = answered(asked[row, answer], before, prompt.later[turn - 1])
                    else:
                        asked[row, answer] = openings[row]
                    which = Which(row, answer, turn)
                    if which in partial.turns:
                        on_answers(1)
                        continue
                    each = asking.asked(asked[row, answer], prompt.images) if turn else first[row]
                    whiches.append(which)
                    draw = f"{seed} {answer} {occurrences[row]} {turn} {_digest(each)}"
                    batch.append(each._replace(seed=draw))
            for found in answer_all(model, batch, decoding, asking.stop_ids, asking.pad_id):
                for place, answer_ids in found.items():
                    turn_text = Turn(asking.text(answer_ids.ids), len(answer_ids.ids), answer_ids.is_finished)
                    partial.add(stream, whiches[place], turn_text)
                stream.flush()
                on_answers(len(found))
    return [
        Answered(prompt, openings[row], [
            [partial.turns[Which(row, answer, turn)] for turn in range(len(prompt.later) + 1)]
            for answer in range(num_answers)
        ])
        for row, prompt in enumerate(prompts)
    ]  # fmt: skip


@contextlib.contextmanager
def _said_if_full(partial: Partial) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{partial.path}: cannot be written ({error.strerror}); make room and type the same words again: "
            f"{partial.num_kept()} answers are there already"
        ) from None


def _occurrences(first: Sequence[Asked]) -> list[int]:
    """How often the same prompt stands before each: two of the same have draws of their own."""
    seen = Counter[str]()
    found = []
    for asked in first:
        found.append(seen[_digest(asked)])
        seen[_digest(asked)] += 1
    return found


def _digest(asked: Asked) -> str:
    shown = b"" if asked.pictures is None else asked.pictures.digest
    return hashlib.sha256(",".join(map(str, asked.ids)).encode() + shown).hexdigest()
