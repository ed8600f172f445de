"""Images on their way to the model: from a row's files to placeholder tokens, and to the pixels of a batch.

A vision-language model's processor does both; the tokenizer carries it, as it carries `Generation`, so that
whoever has the tokenizer has it too. At tokenising every image is looked at once: that it can be read, how
many tokens stand for it, and a digest of its pixels. What is kept of it is where its file lies. A batch reads
and processes its own images again, each once for both sides of its pair, so that memory never holds the
pixels of a data set.

Placeholders belong to the prompt. They are never cut and never scored.

Does not know how a model reads pixels: `rcpo.models.vision` does, and calls `set_sight`.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError, first_line
from rcpo.ranks.transfer import to_device
from rcpo.records.images import Image
from rcpo.records.messages import PLACE, Messages, parts_of
from rcpo.records.record import BadRowError

if TYPE_CHECKING:
    from rcpo.data.render import Rendered

DIGEST_BYTES = 16
FORMS = {"pixel_values", "pixel_attention_mask", "image_grid_thw"}
"""What of a processor's output the families of `rcpo.models.vision` read."""


class Processor(Protocol):
    """What is asked of transformers' processors."""

    image_token: str

    def __call__(self, **inputs: Any) -> Any: ...

    def save_pretrained(self, folder: str) -> Any: ...


@dataclass(frozen=True)
class Sight:
    """What a vision-language model sees with."""

    processor: Processor
    joined_along: int
    """The dimension of pixel tensors along which images stand one after the other."""
    why_apart: str | None = None
    """Why a prompt cannot be computed once for both responses; None: it can."""
    for_text_too: bool = False
    """Whether the model is one of text as well: rows without images are what they would be for that."""
    masks: bool = True
    """Whether any attention kernel will do."""

    def look(self, images: Sequence[Image]) -> tuple[dict[str, Tensor], list[str]]:
        """Pixel tensors of these images, and what the processor writes into the text for each. Raises
        BadRowError where one cannot be read, or the processor refuses it."""
        opened = [image.open() for image in images]
        text = self.processor.image_token * len(images)
        try:
            found = self.processor(
                images=opened, text=[text], return_tensors="pt", return_text_replacement_offsets=True
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise BadRowError(f"the model's processor refuses an image ({first_line(error)})") from None
        pixels = {name: found[name] for name in sorted(FORMS & set(found))}
        return pixels, [each["replacement"] for each in found["text_replacement_offsets"][0]]

    def expand(self, rendered: "Rendered", images: tuple[Image, ...]) -> "Rendered":
        """The texts with room for the tokens of the images, which stand in the prompt. Raises BadRowError
        where the template has not written a place for each, or a text has the token of a place itself."""
        token, split = self.processor.image_token, rendered.split
        for each in (token, self._inner_token()):
            if any(each in text[split:] for text in rendered.texts):
                raise BadRowError(f"a response has the text {each}, which stands for images")
        prompt, pictures = self.write(rendered.texts[0][:split], images)
        return dataclasses.replace(
            rendered,
            texts=tuple(prompt + text[split:] for text in rendered.texts),
            split=len(prompt),
            pictures=pictures,
        )

    def write(self, prompt: str, images: tuple[Image, ...]) -> tuple[str, "Pictures | None"]:
        """A prompt's text with room for the tokens of its images, and the images. Raises BadRowError where
        the template has not written a place for each."""
        token = self.processor.image_token
        if (inner := self._inner_token()) != token and inner in prompt:
            raise BadRowError(f"the prompt has the text {inner}, which stands for images")
        if prompt.count(token) != len(images):
            num = prompt.count(token)
            raise BadRowError(f"the prompt has {token} {num} times for {len(images)} images once rendered")
        if not images:
            return prompt, None
        pixels, written = self.look(images)
        first, *others = prompt.split(token)
        prompt = first + "".join(new + text for new, text in zip(written, others, strict=True))
        return prompt, Pictures(self, images, _digest_of(pixels), tuple(written))

    def _inner_token(self) -> str:
        """What the processor writes into the text for a part of an image, where that is another token than
        the one in its place (Gemma 3)."""
        tokenizer = getattr(self.processor, "tokenizer", None)
        inner = getattr(tokenizer, "image_token", None)
        return inner if isinstance(inner, str) else self.processor.image_token


@dataclass(frozen=True, eq=False)
class Pictures:
    """The images of one pair's prompt."""

    sight: Sight
    images: tuple[Image, ...]
    digest: bytes
    """Of their pixels, after the processor; empty where nobody has looked at them before."""
    written: tuple[str, ...] = ()
    """What stands for each image in the text."""

    def pixels(self) -> dict[str, Tensor]:
        """Read and processed anew. Raises UserError where they are not what they were at the start."""
        names = ", ".join(str(image.path) for image in self.images if image.path is not None)
        try:
            pixels, _ = self.sight.look(self.images)
        except BadRowError as error:
            raise UserError(f"data: {error} ({names}), and could be read at the start; put it back") from None
        if self.digest and _digest_of(pixels) != self.digest:
            raise UserError(f"data: {names} has changed since the run was started; put it back")
        return pixels

    def blank(self) -> "Pictures":
        """Images of the same sizes, and so of the same tokens, without anything on them."""
        images = tuple(dataclasses.replace(image, is_blank=True) for image in self.images)
        return dataclasses.replace(self, images=images, digest=b"")


def _digest_of(pixels: dict[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in pixels.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.digest()


class Pixels(NamedTuple):
    """The images of a batch's pairs, in the order of the pairs, each once; the rows of both sides see
    them."""

    tensors: dict[str, Tensor]
    """By the names of the model's arguments."""
    num_sides: int = 2
    """How many times the rows of a batch go through the pairs."""

    def to(self, device: torch.device) -> "Pixels":
        return Pixels({name: to_device(each, device) for name, each in self.tensors.items()}, self.num_sides)

    def of_side(self) -> "Pixels":
        """For the rows of one side alone."""
        return self._replace(num_sides=1)


class Showing(Protocol):
    """A pair, or a prompt, that may show images."""

    @property
    def pictures(self) -> Pictures | None: ...


def pixels_of(pairs: Sequence[Showing]) -> Pixels | None:
    """Read and processed; None where no pair has an image."""
    seen = [pair.pictures for pair in pairs if pair.pictures is not None]
    if not seen:
        return None
    parts = [each.pixels() for each in seen]
    return Pixels(
        {name: torch.cat([part[name] for part in parts], dim=seen[0].sight.joined_along) for name in parts[0]}
    )


def set_sight(tokenizer: PreTrainedTokenizerBase, sight: Sight) -> None:
    tokenizer.rcpo_sight = sight


def sight_of(tokenizer: PreTrainedTokenizerBase) -> Sight | None:
    """None where the tokenizer's model reads text alone."""
    found = getattr(tokenizer, "rcpo_sight", None)
    return found if isinstance(found, Sight) else None


def in_parts(tokenizer: PreTrainedTokenizerBase, turns: Messages) -> Messages:
    """The turns as the tokenizer's chat template is handed them: as they are, or for a vision-language model
    with content as a list of parts, as its template wants it; a text that is for a model of text as well
    stays one."""
    if (sight := sight_of(tokenizer)) is None:
        return turns
    return [
        {**turn, "content": parts_of(turn["content"])}
        if PLACE in turn["content"] or not sight.for_text_too
        else turn
        for turn in turns
    ]
