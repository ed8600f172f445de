"""What W&B gets at the end of a run besides numbers: the held-out pairs as a table and a plot, the model.

Owns their names, which `rcpo.report.dashboard` shows and `rcpo.comparison.from_wandb` reads back. Does
not guard against a failing W&B: `rcpo.monitor.tracking` does. Imports neither torch nor wandb before it sends
something."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rcpo.runs.answers import Answer
    from rcpo.runs.folder import RunFolder

PAIRS = "pairs/held_out"
"""The table: one row a held-out pair, in the order of the held-out set."""
PAIRS_PLOT = "pairs/displacement"
"""The scatter plot of that table."""
PAIRS_COLUMNS = ("pair", "chosen_change", "rejected_change", "chosen_start", "rejected_start")
"""Number of the pair; change of z_w and of z_l between the first and the last evaluation, and where they
began, in nats."""
ANSWERS = "answers"
"""The table of answers: one row an answer, at each evaluation."""
ANSWERS_COLUMNS = ("step", "pair", "prompt", "initial", "now")
MAX_PAIRS = 10_000
"""W&B shows no more rows of a table; the first so many pairs are sent."""


def log_pairs(wandb_run: Any, run: "RunFolder", summary: dict[str, Any]) -> None:
    """Send the table and its plot with the last step; nothing where there was only one evaluation."""
    import wandb

    start_step, end_step = summary.get("start_step"), summary.get("end_step")
    if start_step is None or end_step is None or start_step == end_step:
        return
    start, end = run.load_pair_results(start_step), run.load_pair_results(end_step)
    columns = (end.z_w - start.z_w, end.z_l - start.z_l, start.z_w, start.z_l)
    values = zip(*(column.tolist() for column in columns), strict=True)
    rows = [[number, *row] for number, row in enumerate(values)][:MAX_PAIRS]
    with staged_in(run.path / "wandb"):
        table = wandb.Table(columns=list(PAIRS_COLUMNS), data=rows)
        title = "Held-out pairs: change of log-probability, nats"
        plot = wandb.plot.scatter(table, "rejected_change", "chosen_change", title=title)
        wandb_run.log({PAIRS: table, PAIRS_PLOT: plot}, step=end_step)


def log_answers(wandb_run: Any, run: "RunFolder", answers: Sequence["Answer"]) -> None:
    """Send the answers of one evaluation as a table, at its step."""
    import wandb

    with staged_in(run.path / "wandb"):
        table = wandb.Table(columns=list(ANSWERS_COLUMNS), data=[list(answer) for answer in answers])
        wandb_run.log({ANSWERS: table}, step=answers[0].step)


def log_model(wandb_run: Any, run: "RunFolder", summary: dict[str, Any]) -> None:
    """Send RUN/final/ as the artifact model-ID, ID being W&B's of the run. Its files are not copied first."""
    import wandb

    numbers = {key: value for key, value in summary.items() if value is not None}
    artifact = wandb.Artifact(f"model-{wandb_run.id}", type="model", metadata=numbers)
    for path in sorted(path for path in run.final.absolute().rglob("*") if path.is_file()):
        name = path.relative_to(run.final.absolute()).as_posix()
        artifact.add_file(str(path), name=name, policy="immutable", skip_cache=True)
    wandb_run.log_artifact(artifact)


@contextlib.contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """Let W&B keep what it has yet to upload in the run folder, not in the user's home: offline it stays
    there for `wandb sync`."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        else:
            os.environ["WANDB_DATA_DIR"] = before
