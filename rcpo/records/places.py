"""Where rows lie and which of them are meant: paths, globs, splits and slices, and the config keys that say
so. Reads nothing (`rcpo.records.readers`).
"""

import dataclasses
import glob
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rcpo.common.errors import UserError, shortened
from rcpo.config.schema import DataConfig, MixPart

MOST_FILES = 100_000
"""In a data folder, or matched by a glob; one with more is something else, such as a home folder."""
_SLICE = re.compile(r"(?P<split>[\w.-]+)(\[((?P<first>-?\d+)(?P<p>%)?)?:((?P<last>-?\d+)(?P<q>%)?)?\])?")
_MOST_NAMED = 3


SUFFIXES = (
    ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet",
)  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Place:
    """Where rows are, and the config keys that say so, for errors."""

    path: str | tuple[str, ...]
    """A file, a glob, a folder or a hub id; or several, read one behind the other."""
    split: str | None
    path_key: str = "data.path"
    split_key: str = "data.split"
    config: str | None = None
    """Which of a data set's configs, where it has several."""
    config_key: str = "data.config"
    revision: str | Mapping[str, str] | None = None
    """Of hub ids: of all, or by id."""
    revision_key: str = "data.revision"

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def shown(self) -> str:
        """The path, or all of a few; else the first and how many follow."""
        first, *others = self.paths
        if len(others) < _MOST_NAMED:
            return ", ".join(self.paths)
        return f"{first} and {len(others)} more"

    def revision_of(self, path: str) -> str | None:
        given = self.revision
        return given.get(path) if isinstance(given, Mapping) else given

    def only(self, path: str) -> "Place":
        """One of its paths."""
        return dataclasses.replace(self, path=path)

    def error(self, fault: str) -> UserError:
        return UserError(f"{self.path_key}={self.shown}: {fault}")

    def __str__(self) -> str:
        named = [name for name in (self.config, self.split) if name is not None]
        return f"{self.shown} [{', '.join(named)}]" if named else self.shown


def training_place(config: DataConfig) -> Place:
    return Place(_given(config.path), config.split, config=config.config, revision=config.revision)


def mixed_place(part: MixPart, config: DataConfig) -> Place:
    """A source of data.mix; errors name the keys that it has there."""
    return Place(
        _given(part.path), part.split, "path", "split", part.config, "config", revision=config.revision
    )


def held_out_place(config: DataConfig) -> Place | None:
    """Where the held-out pairs are, if they have a place of their own."""
    own_key, revision = "data.eval_config", config.revision
    if config.eval_path is not None:
        keys = ("data.eval_path", "data.eval_split")
        return Place(
            _given(config.eval_path), config.eval_split, *keys, config.eval_config, own_key, revision
        )
    if config.eval_split is None and config.eval_config is None:
        return None
    place, keys = _given(config.path), ("data.path", "data.eval_split")
    if config.eval_config is None:
        return Place(place, config.eval_split, *keys, config.config, revision=revision)
    return Place(place, config.eval_split, *keys, config.eval_config, own_key, revision)


def _given(path: str | list[str] | None) -> str | tuple[str, ...]:
    return tuple(path) if isinstance(path, list) else path or ""


@dataclass(frozen=True)
class Slice:
    """Rows of a split, as `datasets` spells them: train[:10%], train[100:200], train[-5:]."""

    split: str | None
    first: int | None = None
    last: int | None = None
    in_percent: bool = False

    def of(self, num_rows: int) -> range:
        """Row numbers. Percent are rounded to the closest row; negative bounds count from the end."""

        def bound(value: int | None, default: int) -> int:
            if value is None:
                return default
            if self.in_percent:
                value = round(value * num_rows / 100)
            return min(max(value + num_rows if value < 0 else value, 0), num_rows)

        return range(bound(self.first, 0), bound(self.last, num_rows))


def slices_of(place: Place) -> list[Slice]:
    """What `place.split` names: a split, a slice of one, or several joined by +. Raises UserError."""
    if place.split is None or not re.search(r"[\[\]+]", place.split):
        return [Slice(place.split)]
    found = [_SLICE.fullmatch(part.strip()) for part in place.split.split("+")]
    if not all(found) or any(_is_beyond(match) for match in found if match is not None):
        raise UserError(
            f"{place.split_key}={place.split}: is no slice of a split; type for example "
            f"{place.split_key}='train[:10%]' or {place.split_key}='train[100:200]'"
        )
    return [_slice_of(match) for match in found if match is not None]


def _slice_of(match: re.Match[str]) -> Slice:
    first, last = (None if match[name] is None else int(match[name]) for name in ("first", "last"))
    return Slice(match["split"], first, last, bool(match["p"] or match["q"]))


def _is_beyond(match: re.Match[str]) -> bool:
    """Percent that there cannot be."""
    found = _slice_of(match)
    return found.in_percent and any(abs(bound or 0) > 100 for bound in (found.first, found.last))


def spelled_out(path: str) -> list[str]:
    """The files that a glob matches, sorted; any other path alone, as it is. Raises OSError, RuntimeError or
    ValueError for what is no path."""
    if not is_glob(path):
        return [path]
    matches = glob.iglob(str(Path(path).expanduser()), recursive=True)
    return sorted(match for match in matches if Path(match).is_file())


def is_glob(path: str) -> bool:
    """Whether `path` is to be matched. A file may have such letters in its name."""
    return glob.has_magic(path) and not Path(path).expanduser().exists()


def files_of(place: Place) -> Iterable[Place]:
    """`place` path by path, globs as the files that they match. Raises UserError where there are none."""
    if not all(place.paths):
        raise place.error("is empty; give a file, a folder or a hub id")
    for path in place.paths:
        try:
            found = spelled_out(path)
        except (RuntimeError, OSError, ValueError) as error:  # ~somebody who does not exist; a name too long
            said = shortened(path)
            raise UserError(f"{place.path_key}={said}: is no path ({error}); give one") from None
        if not found:
            raise place.only(path).error("matches no file; give a glob that does, such as 'pairs/*.jsonl'")
        if len(found) > MOST_FILES:
            raise place.only(path).error(f"matches more than {MOST_FILES} files; give a narrower one")
        yield from map(place.only, found)


def local_path(place: Place) -> Path:
    """Where a place of one path would be on this machine. Raises UserError where that is no path."""
    try:
        path = Path(place.shown).expanduser()
        path.exists()
    except (RuntimeError, OSError) as error:  # ~somebody who does not exist; a name too long; no permission
        raise UserError(
            f"{place.path_key}={shortened(place.shown)}: is no path ({error}); give one"
        ) from None
    return path


def is_hub_id(path: str) -> bool:
    """Whether it is nothing on this machine and may be a data set of the hub."""
    may_be = _HUB_ID.fullmatch(path) and not path.startswith(".") and not path.endswith(SUFFIXES)
    return bool(may_be) and not Path(path).expanduser().exists()


def refuse_absent(place: Place) -> None:
    """Raise UserError for a place of one path that is not here and cannot be a hub id."""
    local = local_path(place)
    if not local.is_file() and not local.is_dir() and not is_hub_id(place.shown):
        raise place.error(
            f"no such file or folder; give a file ({', '.join(SUFFIXES)}), a folder or a hub id"
        )


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote it, with `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def refuse_no_data(folder: Path, place: Place) -> None:
    """Raise UserError for a folder, at `place`, that holds no file of data."""
    if is_saved(folder):
        return
    files = list(itertools.islice(folder.rglob("*"), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        raise place.error(f"holds more than {MOST_FILES} files; give the folder of the data alone")
    if not any(file.name.lower().endswith(SUFFIXES) for file in files):
        raise place.error(f"is a folder without data; it must hold {', '.join(SUFFIXES)} or a saved data set")
