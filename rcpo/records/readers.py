"""Rows from wherever pairs lie: files, globs, `datasets` folders and hub ids, and slices of their splits.

Owns splits, a data set's configs, and the one-line errors about them; file formats are in
`rcpo.records.formats`. Does not know what a row means: `rcpo.records.load` calls `read_rows` and gives the
rows to `rcpo.records.record`. The `datasets` library takes seconds to import, so plain files are read without
it.
"""

import bisect
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError, first_line
from rcpo.records.formats import Part, read_file
from rcpo.records.hub import hub_name, load_at_commit
from rcpo.records.places import (
    SUFFIXES,
    Place,
    files_of,
    is_glob,
    is_saved,
    local_path,
    refuse_absent,
    refuse_no_data,
    slices_of,
)


@dataclass(frozen=True)
class Rows:
    columns: list[str]
    """Names of all columns of any part, in order of appearance."""
    rows: list[dict[str, Any]]
    """One dict per row, at least one row; may hold the wanted columns only."""
    numbers: Sequence[int]
    """Of each row, counted from 0, in the whole: all files and splits one behind the other, unsliced."""
    parts: list[tuple[str, int]]
    """Name of each file or split, and the number of its first row in the whole."""
    size: int
    """Rows of the whole."""
    notes: list[str]
    """How parts were read, where that could be doubted."""

    def where(self, number: int) -> str:
        """A row for an error: its number in the whole, and, of several parts, in its own."""
        if len(self.parts) == 1:
            return f"row {number} (counted from 0)"
        name, start = self._part(number)
        return f"row {number} (counted from 0; row {number - start} of {name})"

    def folder_of(self, number: int) -> Path | None:
        """Where the file of a row lies, which paths in it are relative to; None of data of the hub."""
        name, _ = self._part(number)
        place = Path(name.rpartition(" [")[0] or name).expanduser()
        return place.parent if place.is_file() else place if place.is_dir() else None

    def part_of(self, number: int) -> str | None:
        """The split, or the file's name without its end, that a row is of; None where there is one alone."""
        if len(self.parts) == 1:
            return None
        name, _ = self._part(number)
        _, is_split, split = name.removesuffix("]").rpartition(" [")
        return split if is_split else Path(name).name.partition(".")[0]

    def _part(self, number: int) -> tuple[str, int]:
        return self.parts[bisect.bisect_right([first for _, first in self.parts], number) - 1]


def read_rows(place: Place, wanted: set[str]) -> Rows:
    """Read the rows of files, of a folder's split or of a hub data set's split, or slices of them.

    `wanted` names the columns that will be looked at: formats with columns skip the others.
    Raises UserError with one line where there is no such place or split, or where it does not hold rows.
    """
    slices = slices_of(place)
    parts: dict[str | None, list[Part]] = {each.split: [] for each in slices}
    for split, found in parts.items():
        found += [_read_part(one, split, wanted) for one in files_of(place)]
    in_order = [part for found in parts.values() for part in found]
    firsts = list(itertools.accumulate([part.num_rows for part in in_order], initial=0))
    if not firsts[-1]:
        raise place.error("holds no rows; give a file with one pair a row")
    sizes = {split: sum(part.num_rows for part in found) for split, found in parts.items()}
    starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    rows, numbers = list[dict[str, Any]](), list[int]()
    for each in slices:
        chosen, start = each.of(sizes[each.split]), starts[each.split]
        rows += _rows_of(parts[each.split], chosen)
        numbers += range(start + chosen.start, start + chosen.stop)
    if not rows:
        raise UserError(
            f"{place.split_key}={place.split}: leaves none of the {firsts[-1]} rows of {place.shown}; give a "
            "wider slice"
        )
    return Rows(
        list(dict.fromkeys(column for part in in_order for column in part.columns)),
        rows,
        numbers,
        [(part.name, first) for part, first in zip(in_order, firsts, strict=False) if part.num_rows],
        firsts[-1],
        [note if len(in_order) == 1 else f"{part.name}: {note}" for part in in_order for note in part.notes],
    )


def _rows_of(parts: list[Part], wanted: range) -> list[dict[str, Any]]:
    """These rows of the parts one behind the other."""
    rows, start = [], 0
    for part in parts:
        first, last = (min(max(bound - start, 0), part.num_rows) for bound in (wanted.start, wanted.stop))
        if first < last:
            rows += part.take(range(first, last))
        start += part.num_rows
    return rows


def _read_part(place: Place, split: str | None, wanted: set[str]) -> Part:
    """Rows of one file, folder or hub id."""
    path = local_path(place)
    is_there = path.exists()
    if is_there and path.is_file():
        if split not in (None, "train"):
            raise _unknown_split(place, split, ["train"])
        _refuse_config(place, "is a file")
        return read_file(path, place, wanted)
    loaded = _load_folder(path, place) if is_there and path.is_dir() else _load_hub(place)
    return _split_of(loaded, place, split, wanted)


def _unknown_split(place: Place, split: str | None, known: list[str]) -> UserError:
    names = ", ".join(known)
    advice = f"{place.split_key}={known[0]}"
    if split is None:
        return UserError(
            f"{place.split_key}: has no value and {place.shown} has the splits {names}; type {advice}"
        )
    if place.split_key == "data.eval_split":
        advice += " or data.eval_split=null to draw held-out pairs from the training pairs"
    return UserError(
        f"{place.split_key}={split}: {place.shown} has no such split, only {names}; type {advice}"
    )


def splits_at(place: Place) -> list[str]:
    """The splits of a data set at a place of one path; none of files. Raises UserError where it cannot be
    read."""
    if is_glob(place.shown) or not place.shown:
        return []
    path = local_path(place)
    if path.is_file():
        return []
    saved = path / "dataset_dict.json"
    if saved.is_file():
        try:
            return [str(name) for name in json.loads(saved.read_bytes())["splits"]]
        except (OSError, ValueError, KeyError, TypeError):  # loading it says what is wrong
            return []
    loaded = _load_folder(path, place) if path.is_dir() else _load_hub(place)
    return list(map(str, loaded)) if isinstance(loaded, dict) else []


def _refuse_config(place: Place, kind: str) -> None:
    if place.config is not None:
        raise UserError(
            f"{place.config_key}={place.config}: {place.shown} {kind}, and has no configs; "
            f"type {place.config_key}=null"
        )


# `datasets`


def _load_folder(path: Path, place: Place) -> Any:
    """What `save_to_disk` wrote, or a folder of data files laid out as on the hub."""
    refuse_no_data(path, place)
    if saved := is_saved(path):
        _refuse_config(place, "was saved by `datasets`")
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_from_disk(path) if saved else datasets.load_dataset(str(path), place.config)
    # The library raises nearly any class for a broken folder.
    except Exception as error:
        if (fault := _config_fault(error, place, str(path))) is not None:
            raise fault from None
        raise place.error(
            f"cannot be loaded by `datasets`: {first_line(error)}; {_advice(path, place.path_key)}"
        ) from error
    finally:
        datasets.enable_progress_bars()


def _advice(path: Path, key: str) -> str:
    """What to do about a folder that `datasets` cannot read as one data set: such as one that other things
    lie in, too."""
    own = sorted(file for file in path.iterdir() if file.is_file() and file.name.lower().endswith(SUFFIXES))
    return f"mend the folder, or type {key}={own[0]}, a file in it" if own else "mend the folder"


def _load_hub(place: Place) -> Any:
    path = place.shown
    refuse_absent(place)
    try:
        name = hub_name(path, place.revision_of(path), place.path_key, place.revision_key)
        return load_at_commit(name, place.config)
    except UserError:
        raise
    # No network, no such data set, no access: the hub's clients raise nearly any class.
    except Exception as error:
        if (fault := _config_fault(error, place, path)) is not None:
            raise fault from None
        raise place.error(
            f"is no file or folder here, and not to be had from the hub: {first_line(error)}; "
            f"type {place.path_key}=FOLDER to use a copy on disk"
        ) from error


def _config_fault(error: Exception, place: Place, path: str) -> UserError | None:
    """Where a data set could not be loaded because it has other configs, or several: that, with their
    names."""
    import datasets

    if not isinstance(error, ValueError):  # so does `datasets` say it
        return None
    try:
        known = sorted(map(str, datasets.get_dataset_config_names(path)))
    except Exception:  # what is wrong with the place itself has been raised already
        return None
    if not known or place.config in known or (place.config is None and len(known) == 1):
        return None
    shown, advice = place.config_key, f"type {place.config_key}={known[0]}"
    if place.config is None:
        return UserError(f"{shown}: has no value and {path} has the configs {', '.join(known)}; {advice}")
    only = f"{path} has no such config, only {', '.join(known)}"
    return UserError(f"{shown}={place.config}: {only}; {advice}")


def hub_fingerprint(place: Place) -> str:
    """Of a hub data set as `datasets` has it: its fingerprints of the splits, which contain the commit.
    Raises UserError where it cannot be had."""
    loaded = _load_hub(place)
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return json.dumps({str(name): splits[name]._fingerprint for name in sorted(splits, key=str)})


def _split_of(loaded: Any, place: Place, split: str | None, wanted: set[str]) -> Part:
    """The split of this name; where there is none, the only one, or, to train on, `train`."""
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    known = list(splits)
    named = split
    if named is None:
        is_default = "train" in splits and place.split_key != "data.eval_split"
        named = known[0] if len(known) == 1 else "train" if is_default else None
    if named not in splits:
        raise _unknown_split(place, named, known)
    dataset = splits[named]
    columns = dataset.column_names
    # Of a data set without columns `datasets` has no rows, and what is wrong would not be said.
    looked_at = [name for name in columns if name in wanted] or columns[:1]
    kept = with_files(dataset.select_columns(looked_at))

    def take(chosen: range) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = (kept if len(chosen) == len(kept) else kept.select(chosen)).to_list()
        return rows

    return Part(f"{place.shown} [{named}]", columns, len(dataset), take)


def with_files(dataset: Any) -> Any:
    """The data set with its images as their files' bytes and paths: decoded ones would be pixels of all rows
    at once."""
    import datasets

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        if isinstance(feature, datasets.List | datasets.LargeList) and isinstance(
            feature.feature, datasets.Image
        ):
            return type(feature)(datasets.Image(decode=False))
        return feature

    features = {name: undecoded(feature) for name, feature in dataset.features.items()}
    changed = {name for name, feature in features.items() if feature is not dataset.features[name]}
    for name in sorted(changed):
        dataset = dataset.cast_column(name, features[name])
    return dataset
