"""Images of rows: where one lies, what makes it unfit, and its places in the messages.

A row has images in the column `images` (one or several) or `image` (one), as TRL's vision preference format
has them: a path relative to the file of the row, or {"bytes": ..., "path": ...} as `datasets` writes them.
Their places are the parts {"type": "image"} of the prompt; messages of text alone have all of them before the
first user turn's text, as in TRL. A place is the one character `PLACE` in the text of a message until a chat
template is handed parts (`rcpo.data.pictures`).

Owns what is known of an image before a model's processor. Holds no pixels: files are read when they are
wanted. Does not know models. Called by `rcpo.records.load`.
"""

import base64
import dataclasses
import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.records.messages import PLACE, Messages
from rcpo.records.record import BadRowError, PreferenceRecord

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

COLUMNS = ("images", "image")
"""Columns of images; a row may have one of them."""
MEGAPIXEL = 10**6
GREY = (127, 127, 127)
"""Of a blank image: about zero once a processor has normalised it."""


@dataclass(frozen=True)
class Image:
    """An image as its file holds it."""

    path: Path | None
    data: bytes | None = dataclasses.field(default=None, repr=False)
    """The file's bytes, where the row has them."""
    megapixels: int = 50
    """With more million pixels it is not decoded (data.image_megapixels): 50 are 150 MB once decoded."""
    is_blank: bool = False
    """Shown as an image of its size without anything on it."""

    @property
    def identity(self) -> str:
        """Equal for images of one file, or of equal bytes."""
        return str(self.path) if self.data is None else hashlib.blake2b(self.data).hexdigest()

    def digest(self) -> str:
        """Of the file's bytes. Raises BadRowError where it cannot be read."""
        try:
            data = self.path.read_bytes() if self.data is None and self.path is not None else self.data
        except OSError as error:
            raise BadRowError(f"an image cannot be read ({self.path}: {error.strerror})") from None
        return hashlib.blake2b(data or b"", digest_size=16).hexdigest()

    def _num_bytes(self) -> int | None:
        """None where there is no file."""
        if self.data is not None:
            return len(self.data)
        return self.path.stat().st_size if self.path is not None and self.path.is_file() else None

    def open(self) -> "Picture":
        """The decoded image, upright and in RGB. Raises BadRowError; the reason names no file."""
        import PIL.Image
        import PIL.ImageOps

        source: Any = self.path if self.data is None else io.BytesIO(self.data)
        if self._num_bytes() == 0:
            raise BadRowError("an image is empty (0 bytes)")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
                with PIL.Image.open(source) as picture:
                    width, height = picture.size
                    if width * height > self.megapixels * MEGAPIXEL:
                        raise self._too_large()
                    if not width * height:
                        raise BadRowError("an image has no pixels")
                    picture.load()
                    upright = PIL.ImageOps.exif_transpose(picture).convert("RGB")
                    return PIL.Image.new("RGB", upright.size, GREY) if self.is_blank else upright
        except BadRowError:
            raise
        except PIL.Image.DecompressionBombError:
            raise self._too_large() from None
        except FileNotFoundError:
            raise BadRowError("an image file is missing") from None
        except PIL.UnidentifiedImageError:
            raise BadRowError("an image is of no known format") from None
        # Of a broken file each decoder raises a class of its own.
        except Exception as error:
            what = "is cut off" if "truncated" in str(error) else "cannot be decoded"
            raise BadRowError(f"an image {what}") from None

    def _too_large(self) -> BadRowError:
        return BadRowError(f"an image has more than data.image_megapixels={self.megapixels} million pixels")


def with_images(
    record: PreferenceRecord,
    values: Mapping[str, Any],
    folder: Callable[[], Path | None],
    megapixels: int,
) -> PreferenceRecord:
    """The record with the images of its row, whose paths are relative to what `folder` gives; as it is where
    the row has none. Raises BadRowError where images and places do not match."""
    given = [values.get(name) for name in COLUMNS]
    images = [
        dataclasses.replace(_image(each, folder), megapixels=megapixels)
        for column in given
        for each in _listed(column)
    ]
    turns = record.prompt if isinstance(record.prompt, list) else []
    num_places = sum(turn["content"].count(PLACE) for turn in turns)
    if not images and not num_places:
        return record
    if all(_listed(column) for column in given):
        raise BadRowError("both columns images and image have something; give one of them")
    if not images:
        raise BadRowError("a message has a part of the type image, and the row has no image")
    if not turns:
        raise BadRowError("the prompt is plain text, which has no place for images; type data.as_chat=true")
    if not num_places:
        return dataclasses.replace(record, prompt=_in_front(turns, len(images)), images=tuple(images))
    if num_places != len(images):
        raise BadRowError(f"there are {_num(len(images), 'image')} for {_num(num_places, 'place')}")
    return dataclasses.replace(record, images=tuple(images))


def refuse_missing(images: Iterable[Image]) -> None:
    """Raise BadRowError for an image whose file is not there."""
    for image in images:
        if image.path is not None and not image.path.is_file():
            raise BadRowError(f"an image file is missing: {image.path}")


def _num(num: int, what: str) -> str:
    return f"{num} {what}" + ("" if num == 1 else "s")


def _in_front(turns: Messages, num: int) -> Messages:
    """With all places before the text of the first user turn."""
    first = next((place for place, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        raise BadRowError("no turn of the prompt is a user's, so that there is no place for images")
    turn = {**turns[first], "content": PLACE * num + turns[first]["content"]}
    return [*turns[:first], turn, *turns[first + 1 :]]


def _listed(column: Any) -> list[Any]:
    if column is None or (isinstance(column, str | bytes) and not column):
        return []
    return list(column) if isinstance(column, list | tuple) else [column]


def _image(value: Any, folder: Callable[[], Path | None]) -> Image:
    """One entry of a column."""
    if isinstance(value, Mapping) and not {"bytes", "path"}.isdisjoint(value):
        data, path = value.get("bytes"), value.get("path")
        if data is not None:
            return Image(None, _bytes(data))
        value = path
    if isinstance(value, bytes | bytearray):
        return Image(None, bytes(value))
    if isinstance(value, Path):
        value = str(value)
    if hasattr(value, "save") and hasattr(value, "convert"):  # PIL's
        stream = io.BytesIO()
        value.convert("RGB").save(stream, format="PNG")
        return Image(None, stream.getvalue())
    if not isinstance(value, str) or not value:
        raise BadRowError(f"an image is {type(value).__name__}, neither a path nor bytes")
    if value.startswith(("http://", "https://")):
        raise BadRowError("an image is a URL; rcpo fetches none, so give files")
    path = Path(value).expanduser()
    beside = None if path.is_absolute() else folder()
    return Image(path if beside is None else beside / path)


def _bytes(data: Any) -> bytes:
    """Of a file that has bytes, or, as JSON, base64."""
    if isinstance(data, str):
        try:
            return base64.b64decode(data, validate=True)
        except ValueError:
            raise BadRowError("the bytes of an image are text, and not base64") from None
    if not isinstance(data, bytes | bytearray | memoryview):
        raise BadRowError(f"the bytes of an image are {type(data).__name__}")
    return bytes(data)
