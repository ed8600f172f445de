"""`rcpo.Run`: a run folder from Python, its numbers as pandas tables, its model through transformers."""

import base64
import html
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.common.console import nats
from rcpo.common.errors import UserError
from rcpo.common.locks import is_held, run_lock

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rcpo.config.resolved import ResolvedConfig
    from rcpo.runs.folder import RunFolder


class Run:
    """A run that has trained, trains, or is to train. Everything is read from its folder when it is asked
    for, so a run that trains elsewhere shows what it has written so far.

        run = rcpo.open_run("runs/dpo-on-1")
        run.eval.plot(x="step", y=["displacement/chosen", "displacement/rejected"])
        run.pairs.nsmallest(5, "r_w")[["prompt", "chosen", "r_w"]]     # whose chosen fell most
        model, tokenizer = run.model(), run.tokenizer()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises UserError where `path` is no run folder."""
        self.path = Path(path).absolute()
        """The run folder."""
        self._tables: dict[str, tuple[tuple[int, int], pd.DataFrame]] = {}
        if not self._folder.config.is_file():
            raise UserError(
                f"{path}: is not a run folder (it has no config.yaml); give one that rcpo has made"
            )

    @cached_property
    def _folder(self) -> "RunFolder":
        from rcpo.runs.folder import RunFolder

        return RunFolder(self.path)

    @property
    def config(self) -> "ResolvedConfig":
        """The frozen config, typed: run.config.optim.lr. Imports the user's objectives that it names."""
        from rcpo.runs.frozen import open_run as open_frozen

        return open_frozen(str(self.path))[1]

    @property
    def facts(self) -> dict[str, Any]:
        """run.json: status, times, host, versions, git commit, W&B id, exit reason."""
        return self._folder.read_run()

    @property
    def status(self) -> str:
        """pending, running, done, failed, preempted, interrupted, or lost: it says running, and nothing runs
        it."""
        status = str(self.facts.get("status", "unknown"))
        return "lost" if status == "running" and not is_held(run_lock(self.path)) else status

    @property
    def metrics(self) -> "pd.DataFrame":
        """metrics.jsonl: one row an optimizer step, in the columns' names of the README; nan where a step did
        not measure one."""
        return self._table("metrics")

    @property
    def eval(self) -> "pd.DataFrame":
        """eval.jsonl: one row an evaluation of the held-out pairs, their change against step 0."""
        return self._table("eval")

    def _table(self, name: str) -> "pd.DataFrame":
        """Read again only where the file has changed."""
        import pandas as pd

        path: Path = getattr(self._folder, name)
        found = path.stat() if path.is_file() else None
        state = (-1, -1) if found is None else (found.st_size, found.st_mtime_ns)
        if name not in self._tables or self._tables[name][0] != state:
            rows = self._folder.rows(path)
            # Keys that only some rows have stand where they first appear.
            self._tables[name] = (state, pd.DataFrame(rows) if rows else pd.DataFrame({"step": []}))
        return self._tables[name][1].copy()

    @property
    def pairs(self) -> "pd.DataFrame":
        """The held-out pairs at the last evaluation, in their order: prompt, chosen, rejected as text; z_w
        and z_l, the summed log-probabilities; r_w and r_l, their change against step 0, in nats.

        The text is read from the data again; it is None where that is not to be had, and
        `run.pairs.attrs["no_text"]` says why. Raises UserError where nothing was evaluated.
        """
        from rcpo.library.held_out import pair_table

        return pair_table(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        """The numbers that the run says at its end, flat: end_chosen, end_rejected, end_accuracy, alpha,
        in_band_share, ...; of a run that has not ended, from what it has written so far."""
        known = self.facts.get("summary")
        if known:
            return dict(known)
        from rcpo.monitor.summary import summarize

        return summarize(self._folder.rows(self._folder.metrics), self._folder.rows(self._folder.eval))

    def model(self, **options: Any) -> "PreTrainedModel":
        """The trained model of final/, as transformers loads it; `options` go to `from_pretrained`.

        An adapter that was saved as one is put on its base. Raises UserError where there is no final/.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        from rcpo.models.adapter_files import read_adapter_config
        from rcpo.models.vision import is_vision

        final = self._final()
        whole = (final / "config.json").is_file()
        place = final if whole else read_adapter_config(str(final))["base_model_name_or_path"]
        sees = is_vision(AutoConfig.from_pretrained(place))
        return (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
            final, **options
        )

    def tokenizer(self, **options: Any) -> "PreTrainedTokenizerBase":
        """Its tokenizer, with the chat template that it was trained with."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._final(), **options)

    def _final(self) -> Path:
        if not self._folder.final.is_dir():
            raise UserError(
                f"{self.path}: has no final/, its status is {self.status}; go on with run.resume(), or write "
                f"a checkpoint's model with rcpo export {self.path} OUT"
            )
        return self._folder.final

    def resume(self, allow_change: Sequence[str] = ()) -> "Run":
        """Go on from the newest checkpoint, as `rcpo resume` does, and return this run; one that is done is
        left as it is.

        `allow_change` names what of the config may change: run.resume(["train.steps=300"]) trains longer.
        Raises UserError as `rcpo.train` does.
        """
        from rcpo.launch.start import resume_raising
        from rcpo.library.process import process_kept

        if self.status == "done" and not allow_change:
            return self
        with process_kept():
            resume_raising(str(self.path), [allow_change] if isinstance(allow_change, str) else allow_change)
        return self

    def __repr__(self) -> str:
        return f"<rcpo.Run {self.path.name}: {self._line()}>"

    def _line(self) -> str:
        """Objective, calibration, how far, displacement."""
        from rcpo.comparison.load import flatten

        config = flatten(self.facts.get("config", {}))
        summary = self.summary
        text = (
            f"{config.get('objective.name', '?')}, calibration {config.get('calibration.name', '?')}, "
            f"{self.status} at step {summary['steps']}"
        )
        if summary["end_step"]:
            text += (
                f"; held-out chosen {nats(summary['end_chosen'])}, rejected {nats(summary['end_rejected'])} "
                f"nats, accuracy {summary['end_accuracy']:.2f}"
            )
        return text

    def _repr_html_(self) -> str:
        """For notebooks: the line, and the plot of a run that is done."""
        text = f"<b>{html.escape(self.path.name)}</b>: {html.escape(self._line())}"
        if not self._folder.plot.is_file():
            return text
        picture = base64.b64encode(self._folder.plot.read_bytes()).decode()
        return f'{text}<br><img style="max-width: 60em" src="data:image/png;base64,{picture}">'


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run in a folder that `rcpo train`, `rcpo sweep` or `rcpo.train` has made. Raises UserError where
    there is none."""
    return Run(path)
