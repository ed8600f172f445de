"""What tokenised pairs depend on, as one key: another key wherever other pairs could come out.

Owns which data and tokenizers have a key; without one nothing is kept, and the pairs are made anew at every
start. Files count by their content, read whole every time: sizes and times would miss an edit that keeps
both. Called by `rcpo.training.read_inputs`.
"""

import functools
import hashlib
import json
import os
import platform
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.config.schema import DataConfig
from rcpo.data.generation import generation_of, special_ids
from rcpo.data.pictures import sight_of
from rcpo.records.places import MOST_FILES, Place, held_out_place, mixed_place, spelled_out, training_place
from rcpo.records.readers import hub_fingerprint
from rcpo.records.weights import Weighing

SMALLEST_BYTES = 100_000
"""Data smaller than this are read and tokenised in a fraction of a second; keeping them would not pay."""
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy")
"""Those that read, render and tokenise."""
DIGEST_BYTES = 32

_CLOCK = "strftime_now"
_CLOCK_CALL = re.compile(_CLOCK + r"""\(\s*(["'])(.*?)\1\s*\)""")


class Content(NamedTuple):
    """What lies at data.path and data.eval_path."""

    digests: tuple[str, ...]
    num_bytes: int | None
    """None where it is not known: data of the hub."""


def content_of(config: DataConfig) -> Content | None:
    """The content of the data; None where it is generated, where it cannot be told, and where it is too
    little to be kept. What is wrong with a place is for `rcpo.records` to say."""
    if config.source != "file":
        return None
    training = (
        [training_place(config)] if config.mix is None else [mixed_place(part, config) for part in config.mix]
    )
    places = [*training, *filter(None, [held_out_place(config)])]
    try:
        found = [
            _content_at(file, place) for place in places for path in place.paths for file in spelled_out(path)
        ]
    except (OSError, RuntimeError, ValueError, UserError):
        return None
    digests = tuple(digest for digest, _ in found)
    sizes = [size for _, size in found if size is not None]
    if len(sizes) < len(found):
        return Content(digests, None)
    return Content(digests, sum(sizes)) if sum(sizes) >= SMALLEST_BYTES else None


def token_key(
    content: Content,
    config: DataConfig,
    weighing: Weighing,
    limits: tuple[int, int | None],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> str | None:
    """Key of the pairs; `limits` are train.max_length and train.max_prompt_length. None where a tokenizer's
    behaviour cannot be told from its state: one in Python, or with code of its own, or one that also sees
    images."""
    state = _tokenizer_state(tokenizer)
    if state is None:
        return None
    settings = asdict(config)
    del settings["filter"]  # is applied to the tokenised pairs
    del settings["revision"]  # the content says which
    weighed = [type(weighing).__qualname__, vars(weighing)]
    parts = [
        _code_digest(),
        _versions(),
        content.digests,
        settings,
        weighed,
        limits,
        state,
        dict(template_kwargs),
    ]
    return _digest_of(json.dumps(parts, sort_keys=True).encode())


def _content_at(path: str, named: Place) -> tuple[str, int | None]:
    """Digest and size in bytes of a file or of all files of a folder; of a hub id its commit's. Raises
    OSError, RuntimeError, ValueError or UserError where there is none."""
    place = Path(path).expanduser()
    if place.is_file():
        return _file_digest(place), place.stat().st_size
    if not place.exists():
        return hub_fingerprint(named.only(path)), None
    digest, num_bytes = hashlib.blake2b(digest_size=DIGEST_BYTES), 0
    for number, file in enumerate(_files_below(place)):
        if number >= MOST_FILES:
            raise ValueError("too many files")
        digest.update(f"{file.relative_to(place).as_posix()}\0{_file_digest(file)}\n".encode())
        num_bytes += file.stat().st_size
    return digest.hexdigest(), num_bytes


def _files_below(folder: Path) -> Iterator[Path]:
    """All files, sorted; ValueError where a folder could hold what is not seen from here, or what is no
    file."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if entry.is_symlink():
                raise ValueError("a link to a folder")
            yield from _files_below(entry)
        elif stat.S_ISREG(entry.stat().st_mode):
            yield entry
        else:
            raise ValueError("no regular file")


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError("no regular file")
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> list[Any] | None:
    kind = type(tokenizer)
    if sight_of(tokenizer) is not None:
        return None
    if not tokenizer.is_fast or not kind.__module__.startswith("transformers."):
        return None
    templates = tokenizer.chat_template
    clock = _clock_of(json.dumps(templates, ensure_ascii=False))
    if clock is None:
        return None
    return [
        kind.__qualname__,
        _digest_of(tokenizer.backend_tokenizer.to_str().encode()),
        templates,
        clock,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        sorted(special_ids(tokenizer)),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        asdict(generation_of(tokenizer)),
        bool(getattr(tokenizer, "split_special_tokens", False)),
    ]


def _clock_of(template: str) -> list[str] | None:
    """Some templates write today's date: what they would write now. None where that cannot be told.
    `template` is JSON, in which quotes are escaped."""
    calls = _CLOCK_CALL.findall(template.replace('\\"', '"'))
    if len(calls) < template.count(f"{_CLOCK}("):
        return None
    return [datetime.now().strftime(form) for _, form in calls]


def _digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()


@functools.cache
def _code_digest() -> str:
    """Of the modules of this room and of `records`, which read, render, tokenise and keep."""
    package = Path(__file__).parents[1]
    files = [file for room in ("data", "records") for file in sorted((package / room).glob("*.py"))]
    return _digest_of(b"\0".join(file.name.encode() + b"\0" + file.read_bytes() for file in files))


@functools.cache
def _versions() -> list[str]:
    return [platform.python_version(), *(version(name) for name in LIBRARIES)]
