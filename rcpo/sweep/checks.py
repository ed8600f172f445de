"""Whether the cells' inputs are there and can train, found before anything starts: one check for each
distinct combination of data and model.

Owns what a dry run says about data and models on the hub: it fetches nothing (`rcpo.commands.sweep` sees to
that), and names what it could not check.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rcpo.common.errors import UserError
from rcpo.config.names import BUILTIN
from rcpo.config.resolved import ResolvedConfig
from rcpo.records.places import is_glob
from rcpo.sweep.freeze import FrozenCell


@dataclass(frozen=True)
class Checked:
    """What is known of a cell's inputs."""

    train_pairs: int | None
    """None where the data are on the hub and not here."""
    missing: tuple[str, ...] = ()
    """Ids on the hub of what is not on this machine, where a dry run could not check that."""
    note: str | None = None
    """What else was not looked at, and why."""


def check_inputs(cells: Iterable[FrozenCell], fetch: bool) -> dict[str, Checked]:
    """Read every distinct input once; what is known, by the cell's name. `fetch`: what is on the hub too.

    Raises UserError, which names the first cell concerned, for whatever cannot train.
    """
    known: dict[str, Checked] = {}
    checked = {}
    for frozen in cells:
        key = _key(frozen.root)
        if key not in known:
            try:
                known[key] = _check(frozen.root, fetch)
            except UserError as error:
                raise UserError(f"cell {frozen.cell.name}: {error}") from None
        checked[frozen.cell.name] = known[key]
    return checked


def _key(config: ResolvedConfig) -> str:
    """What of a config decides what is read and whether it can train."""
    train, composition = config.train, config.composition
    return json.dumps(
        [
            asdict(config.data),
            asdict(config.model),
            [train.max_length, train.max_prompt_length, train.pairs_per_step, train.device],
            repr(composition),
        ]
    )


def _check(config: ResolvedConfig, fetch: bool) -> Checked:
    from rcpo.training.read_inputs import read_inputs

    note = None
    if not fetch and find_spec("bitsandbytes") is None:
        if config.model.quantization is not None:
            note = f"not checked: model.quantization={config.model.quantization}, which needs bitsandbytes"
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantization=None))
        if config.optim.name == "adamw_8bit":
            note = note or "not checked: optim=adamw_8bit, which needs bitsandbytes"
            config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name="adamw"))
    try:
        return Checked(len(read_inputs(config).train), note=note)
    except UserError as error:
        on_hub = hub_ids(config)
        # What is not on this machine fails in the hub's clients, whose error is then the cause.
        if fetch or not on_hub or error.__cause__ is None:
            raise
    has_data = not set(config.data.paths()) & set(on_hub)
    return Checked(_count_pairs(config) if has_data else None, tuple(on_hub), note)


def _count_pairs(config: ResolvedConfig) -> int:
    """Training pairs before tokenising: what can be said without the model's tokenizer."""
    from rcpo.records.lists import num_pairs
    from rcpo.records.load import load_records
    from rcpo.records.weights import weighing_of

    records = load_records(config.data, weighing_of(config.composition)).train
    return sum(num_pairs(record, config.data.lists) for record in records)


def hub_ids(config: ResolvedConfig) -> list[str]:
    """What of model, adapter and data is an id on the hub."""
    data = config.data.paths() if config.data.source == "file" else []
    named = dict.fromkeys([config.model.path, config.model.lora.adapter, *data])
    return [path for path in named if path and path not in BUILTIN and not _is_here(path)]


def _is_here(path: str) -> bool:
    return is_glob(path) or Path(path).expanduser().exists()
