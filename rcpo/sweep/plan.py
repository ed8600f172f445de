"""What a sweep would do and cost: the table of `rcpo sweep --dry-run`."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rcpo.common.console import duration, fitted, number
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.sampler import PairSampler
from rcpo.sweep.checks import Checked
from rcpo.sweep.definition import Definition
from rcpo.sweep.folder import SweepFolder, is_sweep
from rcpo.sweep.freeze import FrozenCell
from rcpo.sweep.table import new_table


@dataclass(frozen=True)
class Cost:
    """Of one cell."""

    steps: int | None
    pairs: int | None
    """Training pairs, repeats counted; None where that takes data that are not here."""
    seconds: float | None
    """Start-up and the reference pass included; None where the number of pairs or the rate is unknown."""
    devices: int
    on_gpus: bool


FORWARD_SHARE = 1 / 3
"""Of a training step's time: the backward pass takes twice as long, and a reference pass has none."""


def cost_of(
    frozen: FrozenCell,
    checked: Checked,
    definition: Definition,
    rate: float | None,
    has_reference_pass: bool = False,
) -> Cost:
    """The cost at `rate` pairs a second; `has_reference_pass`: it computes what other cells will find."""
    config = frozen.config
    known = [definition.estimate.train_pairs.get(path) for path in config.data.train_paths()]
    num_pairs = checked.train_pairs or (sum(filter(None, known)) if known and all(known) else None)
    if num_pairs is not None and config.data.train_pairs is not None:
        num_pairs = min(num_pairs, config.data.train_pairs)
    steps = config.train.steps
    if steps is None and num_pairs is not None and config.train.epochs is not None:
        steps = PairSampler(num_pairs, config.train.pairs_per_step, 0).steps_of(config.train.epochs)
    pairs = None if steps is None else steps * config.train.pairs_per_step
    seconds = None
    if pairs is not None and rate is not None:
        seconds = definition.estimate.start_seconds + pairs / rate
        if has_reference_pass:
            visited = min(pairs, num_pairs or pairs) + (config.data.eval_pairs or 0)
            seconds += FORWARD_SHARE * visited / rate
    return Cost(steps, pairs, seconds, config.world_size(), config.train.device == "cuda")


def _reference_of(config: ResolvedConfig) -> str | None:
    """What cells have in common that share one reference pass; None where there is none."""
    if config.reference.name == "live":
        return None
    return repr((config.model, config.data, config.reference, config.train.max_length))


def measured_rates(sweep: SweepFolder) -> dict[str, float]:
    """Pairs a second by kind of cell: the median over the finished cells that this sweep folder has."""
    rates = defaultdict(list)
    if not is_sweep(sweep.path):
        return {}
    from rcpo.runs.frozen import open_run

    for cell in sweep.read_cells():
        rate = sweep.run(cell).read_run().get("summary", {}).get("pairs_per_second")
        if rate is not None:
            rates[kind_of(open_run(str(sweep.run(cell).path))[1])].append(float(rate))
    return {kind: statistics.median(values) for kind, values in rates.items()}


def kind_of(config: ResolvedConfig) -> str:
    """What mostly decides how fast a cell is: its model, its adapter, its ranks."""
    return f"{config.model.path} {config.model.lora.rank} {config.model.quantization} {config.world_size()}"


def print_plan(
    console: Console,
    cells: Sequence[FrozenCell],
    checked: Mapping[str, Checked],
    definition: Definition,
    sweep: SweepFolder,
    given_rate: float | None,
) -> None:
    """The grid as a table, what could not be checked, and what it costs."""
    measured = {} if given_rate is not None else measured_rates(sweep)
    guess = given_rate or definition.estimate.pairs_per_second
    costs, referred = {}, set()
    for frozen in cells:
        rate, key = measured.get(kind_of(frozen.config), guess), _reference_of(frozen.config)
        makes_pass = key is not None and key not in referred
        costs[frozen.cell.name] = cost_of(
            frozen, checked[frozen.cell.name], definition, rate, has_reference_pass=makes_pass
        )
        referred.add(key)
    axes = list(dict.fromkeys(axis for frozen in cells for axis in frozen.cell.axes))
    rows = {frozen.cell.name: _texts(frozen, costs[frozen.cell.name], axes) for frozen in cells}
    numbers = ["time", "steps", "pairs", "ranks"]
    ranks = {name: rank for rank, name in enumerate(["cell", *numbers, *axes])}

    def made(names: Sequence[str]) -> Table:
        table = new_table(
            console,
            [name for name in names if name not in numbers],
            [name for name in names if name in numbers],
        )
        for texts in rows.values():
            table.add_row(*(texts[name] for name in names))
        return table

    names = ["cell", *axes, "steps", "pairs", "ranks", "time"]
    table = fitted(console, names, made, ranks.__getitem__)[0] if console.is_terminal else made(names)
    console.print(table)
    for line in _notes(checked):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(_total(list(costs.values()))), soft_wrap=True)
    console.print(Text(_source_of_rate(sweep, measured, given_rate, guess)), soft_wrap=True)
    if any(cost.seconds is not None for cost in costs.values()):
        start = f"{definition.estimate.start_seconds:g} s of start-up for each cell (estimate.start_seconds)"
        console.print(Text(f"time counts {start}, and one reference pass for cells alike"), soft_wrap=True)


def _texts(frozen: FrozenCell, cost: Cost, axes: Sequence[str]) -> dict[str, str]:
    """What a cell has in each column."""
    return {axis: str(frozen.cell.axes.get(axis, "")) for axis in axes} | {
        "cell": frozen.cell.name,
        "steps": _count(cost.steps),
        "pairs": _count(cost.pairs),
        "ranks": str(cost.devices),
        "time": "?" if cost.seconds is None else duration(cost.seconds),
    }


def _count(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _notes(checked: Mapping[str, Checked]) -> Iterator[str]:
    """Each thing that was not checked, once."""
    missing = dict.fromkeys(name for item in checked.values() for name in item.missing)
    if missing:
        yield f"not checked: hub data and models that are not on this machine: {', '.join(missing)}"
    yield from dict.fromkeys(item.note for item in checked.values() if item.note is not None)


def _total(costs: Sequence[Cost]) -> str:
    """One line for the whole grid."""
    steps, pairs = [cost.steps for cost in costs], [cost.pairs for cost in costs]
    known = [cost for cost in costs if cost.seconds is not None]
    line = f"{len(costs)} cells, {_sum(steps)} steps, {_sum(pairs)} pairs"
    if not known:
        return line
    hours = sum(cost.seconds * cost.devices for cost in known if cost.seconds is not None) / 3600
    unit = "GPU-hours" if any(cost.on_gpus for cost in costs) else "hours of one process"
    rest = len(costs) - len(known)
    return f"{line}, {number(hours)} {unit}{f' without the {rest} cells of unknown cost' if rest else ''}"


def _sum(numbers: Sequence[int | None]) -> str:
    known = [number for number in numbers if number is not None]
    return f"{sum(known):,}{'' if len(known) == len(numbers) else ' (and more)'}"


def _source_of_rate(
    sweep: SweepFolder, measured: Mapping[str, float], given: float | None, guess: float | None
) -> str:
    if given is not None:
        return f"at {given:g} pairs a second for each cell, as given"
    if measured:
        rates = ", ".join(f"{rate:.3g}" for rate in measured.values())
        return f"at {rates} pairs a second for each cell, as measured on the finished cells of {sweep.path}"
    if guess is not None:
        return f"at {guess:g} pairs a second for each cell, as the sweep file estimates"
    return "time: of unknown speed; give --pairs-per-second X, or ask again when a cell has finished"
