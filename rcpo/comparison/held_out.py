"""The held-out pairs of a run, read again from its data: their words, and their tokens.

Per-pair results hold numbers alone, in the order of the held-out set. Where the data is not there any more,
or gives other pairs than the run measured, the pairs keep their numbers and have no words.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rcpo.common.errors import UserError
from rcpo.comparison.load import ComparedRun

if TYPE_CHECKING:
    from rcpo.config.schema import ModelConfig
    from rcpo.data.tokenize import TokenizedPair
    from rcpo.records.record import PreferenceRecord

Section = TypeVar("Section")


@dataclass(frozen=True)
class Origin:
    """What a pair's tokens, and its scores at the start of a run, depend on."""

    model: "ModelConfig"
    max_length: int
    max_prompt_length: int | None
    append_eos: bool = True

    @property
    def has_tokenizer_here(self) -> bool:
        """Whether nobody has to be asked for the tokenizer: the model is in a folder, or its commit is on
        this machine."""
        from rcpo.models.hub import is_commit_here

        return model_folder(self.model).is_dir() or is_commit_here(self.model.path, self.model.revision)

    @property
    def is_here(self) -> bool:
        """Whether nobody has to be asked for the model: it is in folders of this machine."""
        folders = [model_folder(self.model), Path(self.model.lora.adapter or ".")]
        return all(folder.is_dir() for folder in folders)


def model_folder(model: "ModelConfig") -> Path:
    """Where the model is, if it is in a folder; no folder for a hub id."""
    import rcpo.builtin
    from rcpo.config.names import BUILTIN, last_part

    if model.path not in BUILTIN:
        return Path(model.path)
    return Path(rcpo.builtin.__file__).parent / last_part(model.path)


def data_settings(run: ComparedRun) -> dict[str, Any]:
    """Equal for runs with the same held-out pairs: filters are of training pairs alone."""
    return {
        key: value
        for key, value in run.settings.items()
        if key.startswith(("data.", "train.max_")) and not key.startswith("data.filter.")
    }


def model_settings(run: ComparedRun) -> dict[str, Any]:
    """Equal for runs that start from the same model."""
    return {key: value for key, value in run.settings.items() if key.startswith("model.")}


def held_out_records(run: ComparedRun) -> "list[PreferenceRecord] | str":
    """The records of the run's held-out pairs in their order, or in words why there are none."""
    # Reading data needs the whole config machinery, and with it torch.
    from pydantic import ValidationError

    from rcpo.config.schema import DataConfig
    from rcpo.records.load import load_records, records_at
    from rcpo.records.weights import WEIGHT_PARTS

    tree = _tree_of(run, "data.")
    # Filters and weights are of training pairs alone.
    tree.pop("filter", None)
    columns = tree.get("columns")
    if isinstance(columns, dict):
        tree["columns"] = {
            part: name for part, name in columns.items() if part not in ("gold", *WEIGHT_PARTS)
        }
    try:
        config = _section(DataConfig, tree)
        if config.source == "file" and (rows := _noted_rows(run)) is not None:
            return _if_same(run, records_at(config, rows))
        records = load_records(config).held_out
        if run.pairs is not None and len(records) > len(run.pairs.r_w):
            records = _that_can_be_measured(records, origin_of(run))
    except UserError as error:
        return str(error)
    except KeyError as error:
        return f"the data has no row {error} any more that can be held out"
    except (ValidationError, OSError, ValueError, TypeError, ImportError) as error:
        return f"the data cannot be read: {' '.join(str(error).split())[:200]}"
    if run.pairs is None or len(records) != len(run.pairs.r_w):
        return "the data now gives another number of held-out pairs than the run measured"
    return _if_same(run, records)


def _if_same(run: ComparedRun, records: "list[PreferenceRecord]") -> "list[PreferenceRecord] | str":
    """The records, or in words that they are not those of the run, by the digest of their tokens; not looked
    at where the run has no digest, or the tokenizer is not here. Raises UserError as `tokenized` does."""
    from rcpo.training.identity import pairs_digest

    origin = origin_of(run)
    if run.held_out is None or not origin.has_tokenizer_here:
        return records
    lists = str(run.settings.get("data.lists", "best_worst"))
    if pairs_digest(tokenized(origin, records, lists)) == run.held_out:
        return records
    return "the data, or the tokenizer, has changed since the run measured its held-out pairs"


def _noted_rows(run: ComparedRun) -> list[int] | None:
    """Row numbers of the held-out pairs in the run's account of rows; None where it has none."""
    try:
        rows = json.loads((run.path / "run.json").read_text(encoding="utf-8"))["rows"]["held_out_rows"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_whole = isinstance(rows, list) and run.pairs is not None and len(rows) == len(run.pairs.r_w)
    return rows if is_whole else None


def _that_can_be_measured(records: "list[PreferenceRecord]", origin: Origin) -> "list[PreferenceRecord]":
    """Without those that the run has dropped for their tokens. Raises UserError where the tokenizer is not
    here."""
    if not origin.is_here:
        raise UserError(
            "the data gives more held-out pairs than the run measured; to tell which those are takes the "
            f"tokenizer, and {origin.model.path} is not in a folder of this machine"
        )
    kept = {pair.row for pair in tokenized(origin, records)}
    return [record for record in records if record.row in kept]


def origin_of(run: ComparedRun) -> Origin:
    """The model that the run started from. Code in its folder is never run for a report, and an adapter that
    the run adds changes nothing at its start. Raises UserError where the config has none."""
    from pydantic import ValidationError

    from rcpo.config.schema import LoraConfig, ModelConfig

    try:
        model = _section(ModelConfig, _tree_of(run, "model."))
        length, prompt_length = (
            run.settings.get(f"train.{key}") for key in ("max_length", "max_prompt_length")
        )
        if not isinstance(length, int):
            raise TypeError("train.max_length is not there")
    except (ValidationError, ValueError, TypeError) as error:
        raise UserError(f"the run's config cannot be read: {' '.join(str(error).split())[:200]}") from None
    lora = LoraConfig(rank=None) if model.lora.adapter is None else model.lora
    model = dataclasses.replace(
        model, lora=lora, trust_remote_code=False, attention=None, gradient_checkpointing=False
    )
    return Origin(model, length, prompt_length, run.settings.get("data.append_eos") is not False)


def tokenized(
    origin: Origin, records: "Sequence[PreferenceRecord]", lists: str = "best_worst"
) -> "Sequence[TokenizedPair]":
    """Those of `records` that can be measured, as the run saw them; of a list its best and its worst
    response, or all with data.lists=whole. Raises UserError where there is no
    tokenizer."""
    from rcpo.data.tokenize import tokenize_records
    from rcpo.models.load import load_tokenizer

    tokenizer = load_tokenizer(origin.model)
    limits = (origin.max_length, origin.max_prompt_length, "drop")
    written = (origin.model.chat_template_kwargs, origin.append_eos)
    lists = "whole" if lists == "whole" else "best_worst"
    return tokenize_records(records, tokenizer, *limits, *written, lists).pairs


def _section(kind: type[Section], tree: dict[str, Any]) -> Section:
    """A part of a config from what a run has of it; keys that are not known any more are left out."""
    from pydantic import TypeAdapter

    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return TypeAdapter(kind).validate_json(
        json.dumps({key: value for key, value in tree.items() if key in known}, default=str)
    )


def _tree_of(run: ComparedRun, prefix: str) -> dict[str, Any]:
    """The flat settings below `prefix` as nested dicts."""
    tree: dict[str, Any] = {}
    for key, value in run.settings.items():
        if key.startswith(prefix):
            *sections, last = key.removeprefix(prefix).split(".")
            inside = tree
            for section in sections:
                inside = inside.setdefault(section, {})
            inside[last] = value
    return tree
