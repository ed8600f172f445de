"""Prompts to be answered: files of them in the forms that people have, and a prompt as the model sees it.

Forms of a row, each with the keys by which it is known:

    {"instruction": text}                       AlpacaEval
    {"question_id": n, "turns": [text, text]}   MT-Bench, asked one after the other
    {"question_id": id, "turns": [{"content": text}]}   Arena-Hard 0.1
    {"uid": id, "prompt": text}                 Arena-Hard 2.0
    {"prompt": text or messages}, {"messages": messages}, or text alone

with images in a column `images` or `image`, as pairs have them (`rcpo.records.images`).

Does not write answers (`rcpo.evaluation.forms`). `rcpo.data.tokenize` says what training sees; the two agree
on what a prompt is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.data.generation import tokens_in_front
from rcpo.data.pictures import sight_of
from rcpo.data.template import Template, apply, ends_of_answers, look_at_template, taken_apart
from rcpo.evaluation.decoding import Asked
from rcpo.evaluation.json_rows import json_rows
from rcpo.records.images import COLUMNS, Image, refuse_missing, with_images
from rcpo.records.messages import ROLES, BadMessageError, Messages, parsed, turns, without_system
from rcpo.records.record import BadRowError, PreferenceRecord

FORMS = "instruction, prompt, messages, or turns"
MEGAPIXELS = 50
"""A larger image is not decoded, as with the default of data.image_megapixels."""


@dataclass(frozen=True)
class Prompt:
    """What is asked."""

    opening: str | Messages
    """Text, or a conversation that ends with a user's turn."""
    later: tuple[str, ...] = ()
    """User turns that are asked once the one before is answered."""
    row: dict[str, Any] = field(default_factory=dict)
    """As it was given."""
    images: tuple[Image, ...] = ()
    """Those whose places are in `opening`."""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a .json or .jsonl file. Raises UserError that names the row where one cannot be read."""
    prompts = []
    for number, row in enumerate(json_rows(path, f"prompts={path}")):
        try:
            prompt = _prompt(row)
        except (BadRowError, BadMessageError) as error:
            raise UserError(
                f"prompts={path}: row {number} (counted from 0) {error}; give it {FORMS}"
            ) from None
        try:
            prompts.append(_shown(prompt, number, path.parent))
        except BadRowError as error:
            raise UserError(
                f"prompts={path}: row {number} (counted from 0): {error}; mend it or leave it out"
            ) from None
    if not prompts:
        raise UserError(f"prompts={path}: has no rows; give a file with {FORMS} in every row")
    return prompts


def _prompt(row: Any) -> Prompt:
    """Raises BadRowError or BadMessageError."""
    if isinstance(row, str):
        return Prompt(_text(row), row={"prompt": row})
    if not isinstance(row, dict):
        raise BadRowError("is neither text nor an object")
    if isinstance(row.get("turns"), list):
        first, *later = [
            turn.get("content") if isinstance(turn, dict) else turn for turn in row["turns"]
        ] or [None]
        return Prompt(_text(first), tuple(map(_text, later)), row)
    for key in ("instruction", "prompt", "messages", "conversations"):
        if row.get(key) is not None:
            break
    else:
        raise BadRowError(f"has none of {FORMS}")
    value = row[key]
    if isinstance(value, str):
        return Prompt(_text(value), row=row)
    return Prompt(_conversation(value), row=row)


def _shown(prompt: Prompt, number: int, folder: Path) -> Prompt:
    """The prompt with the images of its row, whose paths are relative to `folder`. Raises BadRowError where
    images and places do not match, or a file is missing."""
    opening, has_images = prompt.opening, any(prompt.row.get(name) for name in COLUMNS)
    if isinstance(opening, str):
        if not has_images:
            return prompt
        opening = [{"role": "user", "content": opening}]
    record = with_images(PreferenceRecord(opening, [], [], number), prompt.row, lambda: folder, MEGAPIXELS)
    refuse_missing(record.images)
    return replace(prompt, opening=record.prompt, images=record.images)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRowError("has a prompt without text")
    return value


def _conversation(value: Any) -> Messages:
    """Up to the last turn that is to be answered: an answer at the end of a conversation is left out."""
    value = parsed(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "role" in turn for turn in value):
        raise BadRowError("has a prompt that is neither text nor messages with role and content")
    found = turns(value)
    if found and found[-1]["role"] == "assistant":
        found.pop()
    if not found or any(turn["role"] not in ROLES for turn in found):
        raise BadRowError("has messages of unknown roles, or none that asks for an answer")
    return found


class Asking:
    """Prompts as a model sees them: with its chat template, as in training, and where its answers stop."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: dict[str, Any],
        system: str | None = None,
        keeps_system: str = "keep",
        is_chat: bool | None = None,
    ) -> None:
        """`system` is a system turn for prompts that have none; `keeps_system` is data.system; text becomes a
        user's turn where `is_chat`, by default where the tokenizer has a chat template."""
        self.tokenizer, self._kwargs = tokenizer, template_kwargs
        self._system, self._keeps_system = system, keeps_system
        has_template = tokenizer.chat_template is not None
        self._is_chat = has_template if is_chat is None else is_chat
        self._template: Template | None = (
            look_at_template(tokenizer, template_kwargs) if has_template else None
        )
        pad = tokenizer.pad_token_id
        self.pad_id = 0 if pad is None else int(pad)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return ends_of_answers(self.tokenizer, self._template)

    def conversation(self, prompt: Prompt) -> str | Messages:
        """What is asked first: text as it is, or messages with the system turn."""
        opening = prompt.opening
        if isinstance(opening, str):
            if not self._is_chat:
                return opening
            opening = [{"role": "user", "content": opening}]
        if self._system is not None and opening[0]["role"] != "system":
            opening = [{"role": "system", "content": self._system}, *opening]
        return without_system(opening, self._keeps_system)

    def ids(self, asked: str | Messages) -> list[int]:
        """Tokens of a text, or of a conversation with its generation prompt, without images. Raises
        BadRowError where the template refuses it, UserError where there is none."""
        return self.asked(asked).ids

    def asked(self, asked: str | Messages, images: tuple[Image, ...] = (), seed: str = "") -> Asked:
        """What `rcpo.evaluation.decoding` is given: tokens as in `ids`, with room for those of `images`.
        Raises BadRowError where an image cannot be read, or has no place; else as `ids` does."""
        tokenizer, pictures = self.tokenizer, None
        if isinstance(asked, str):
            ids, front = self._ids(asked), tokens_in_front(tokenizer)
            ids = ids if ids[: len(front)] == front else [*front, *ids]
        else:
            if self._template is None:
                raise UserError(
                    "chat_template=null: the prompts are messages and the tokenizer has no chat template; "
                    "type chat_template=plain"
                )
            if self._template.takes_apart:
                asked = [taken_apart(turn) for turn in asked]
            text, sight = apply(tokenizer, asked, True, self._kwargs), sight_of(tokenizer)
            if sight is not None:
                text, pictures = sight.write(text, images)
            ids = self._ids(text)
        while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            ids = ids[1:]
        if not ids:
            raise BadRowError("is no token of the model's")
        return Asked(ids, seed, pictures)

    def text(self, ids: Iterable[int]) -> str:
        """An answer's words."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found


def answered(asked: str | Messages, answer: str, question: str) -> str | Messages:
    """The conversation with an answer and the user's next turn."""
    if isinstance(asked, str):
        return f"{asked}{answer}\n\n{question}"
    return [*asked, {"role": "assistant", "content": answer}, {"role": "user", "content": question}]


def with_rows(
    prompts: Sequence[str | Messages], images: Sequence[tuple[Image, ...]] | None = None
) -> list[Prompt]:
    """Prompts that come from no file of prompts, and the images of each."""
    return [
        Prompt(opening, row={"prompt": opening} | _named(seen), images=seen)
        for opening, seen in zip(prompts, images or [()] * len(prompts), strict=True)
    ]


def _named(images: tuple[Image, ...]) -> dict[str, Any]:
    """Their files, where all have one."""
    paths = [str(image.path) for image in images if image.path is not None]
    return {"images": paths} if images and len(paths) == len(images) else {}
