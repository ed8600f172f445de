"""`rcpo.train`: what `rcpo train` does, from Python, with a `Run` in place of an exit code."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rcpo.common.errors import UserError
from rcpo.common.installed import OBJECTIVES, names_in
from rcpo.library.process import process_kept
from rcpo.library.rows import kept_rows
from rcpo.library.run import Run

if TYPE_CHECKING:
    import datasets
    import pandas as pd

    from rcpo.config.resolved import ResolvedConfig

Pairs: TypeAlias = "Iterable[Mapping[str, Any]] | datasets.Dataset | pd.DataFrame"
"""Rows of any form that a data file may have: prompt, chosen and rejected, as text or as messages."""
OF_DATA = (
    "data",
    "data.path",
    "data.mix",
    "data.config",
    "data.split",
    "data.eval_path",
    "data.eval_config",
    "data.eval_split",
)
"""Words that say where pairs are."""


def train(
    *words: str, pairs: "Pairs | None" = None, held_out: "Pairs | None" = None, overwrite: bool = False
) -> Run:
    """Train as `rcpo train WORDS` does, and return the run.

        run = rcpo.train("objective=simpo", "calibration=on")
        run = rcpo.train("objective=dpo", "model.path=MODEL", "optim.lr=1e-6", pairs=rows, held_out=others)

    `pairs` and `held_out` are rows: a list of dicts, a `datasets.Dataset` or a pandas DataFrame, written to
    rcpo's cache folder so that the run can be resumed; without `held_out`, data.eval_pairs of the pairs are
    held out. `overwrite` replaces an old run of that name or run_dir. One rank trains in this process, which
    is afterwards as it was; several are processes of their own. Ctrl-C stops the run, and `Run.resume` goes
    on from its newest checkpoint.

    Raises UserError, whose message is one line, for bad input; NonFiniteError, SaveError and StoppedError,
    which are UserErrors too, where the run stops before its end.
    """
    from rcpo.launch.start import start_raising

    _check_words(words)
    with process_kept():
        data = _kept_data(words, pairs, held_out)
        folder = start_raising(lambda: _prepare(words, data), overwrite)
    return Run(folder.path)


def _check_words(words: tuple[object, ...]) -> None:
    from rcpo.config.refused import only_prints

    for word in words:
        if not isinstance(word, str):
            raise UserError(f'{word!r}: is no word; write rcpo.train("objective=simpo", "calibration=on")')
        if word == "--overwrite":
            raise UserError("--overwrite: is an argument in Python; write overwrite=True")
        if only_prints([word]):
            raise UserError(f"{word}: prints something and trains nothing; type rcpo train {word} for that")


def _kept_data(words: tuple[str, ...], pairs: "Pairs | None", held_out: "Pairs | None") -> dict[str, Path]:
    """Keys of the data section for the rows that were given, kept as files."""
    if pairs is None:
        if held_out is not None:
            raise UserError("held_out: are rows beside pairs=...; give those too, or data.eval_path=FILE")
        return {}
    given = next((word for word in words if word.lstrip("+").split("=")[0] in OF_DATA), None)
    if given is not None and given != "data=file":
        raise UserError(f"{given}: the pairs are given as rows already; leave out the word, or pairs=...")
    data = {"path": kept_rows(pairs, "pairs")}
    if held_out is not None:
        data["eval_path"] = kept_rows(held_out, "held_out")
    return data


def _prepare(words: tuple[str, ...], data: dict[str, Path]) -> "ResolvedConfig":
    """The resolved config of the words, with the files of `data` in its data section."""
    from rcpo.config.compose import compose
    from rcpo.config.resolve import resolve
    from rcpo.config.validate import validate
    from rcpo.ranks.environment import joined_world_size

    own = ["data=file", *(f"data.{key}={path.name}" for key, path in data.items())] if data else []
    tree = compose([*(word for word in words if word not in own), *own])
    assert tree is not None  # only_prints has been asked
    # Not as words: a path may hold what Hydra's grammar gives a meaning to.
    tree["data"] |= {key: str(path) for key, path in data.items()}
    config = resolve(validate(tree), joined_world_size())
    _refuse_unreachable(config)
    return config


def _refuse_unreachable(config: "ResolvedConfig") -> None:
    """Raise UserError where other processes are to train an objective that this one alone knows."""
    from rcpo.objectives.registry import OWN

    name = config.objective["name"]
    is_here_alone = name in OWN and config.objective.get("module") is None
    if is_here_alone and config.world_size() > 1 and name not in names_in(OBJECTIVES):
        raise UserError(
            f"objective={name}: is registered in this process alone, and {config.world_size()} others are to "
            "train it; write it into a file and add objective.module=FILE.py"
        )
