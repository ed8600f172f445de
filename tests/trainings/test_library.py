"""`rcpo.train`, `Run`, `Sweep` and `compare` from Python, on tiny models: what they give, and what they leave
of the process that they train in."""

import json
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from transformers import AutoModelForCausalLM

import rcpo
from helpers.cases import write_inputs
from helpers.plain_loop import summed
from rcpo.common.files import cache_dir
from rcpo.comparison.forms import as_csv
from rcpo.comparison.view import make_view
from rcpo.ranks.distributed import RANK_VARIABLES
from rcpo.sweep.definition import read_definition
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.grow import plan_growth, write_growth
from rcpo.sweep.target import Here
from rcpo.training.read_inputs import read_inputs

WORDS = (
    "optim=sgd", "optim.lr=0.02", "train.steps=6", "train.pairs_per_step=8", "train.pairs_per_device=4",
    "train.eval_every=4", "train.device=cpu", "tracking=none",
)  # fmt: skip
LOSS = """
import rcpo

@rcpo.objectives.register("my_loss", needs_reference=True)
def my_loss(pair, config):
    return pair.margin() * float("nan")
"""
OF_SIGNS = {f"displacement/{key}" for key in ("chosen_down", "both_down", "accuracy")} | {"dynamics/pathway"}
"""What rounding decides before the first update, where every r is 0 but for it."""


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs of this file outlive a test, and so does the cache that holds their pairs."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCPO_CACHE", str(cache))
        yield cache


@pytest.fixture(autouse=True)
def cache_of_its_own(one_cache: Path) -> None:
    """In the place of the fixture of all tests."""


@pytest.fixture(scope="module")
def run(inputs: Path) -> rcpo.Run:
    """dpo with `on`, every step measured, on rows; of a tied model."""
    return rcpo.train(
        *WORDS, f"model.path={inputs / 'llama-tied'}", "objective=dpo", "calibration=on",
        "calibration.every=1", f"run_dir={inputs / 'runs' / 'on'}",
        pairs=rows_of(inputs / "train.jsonl"), held_out=pd.DataFrame(rows_of(inputs / "held-out.jsonl")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def off(inputs: Path) -> rcpo.Run:
    """The same without calibration, from files."""
    return rcpo.train(
        *WORDS, f"model.path={inputs / 'llama-tied'}", "objective=dpo", f"run_dir={inputs / 'runs' / 'off'}",
        "data=file", f"data.path={inputs / 'train.jsonl'}", f"data.eval_path={inputs / 'held-out.jsonl'}",
    )  # fmt: skip


def test_a_run_has_its_numbers_as_tables(run: rcpo.Run, inputs: Path) -> None:
    assert (run.status, run.path) == ("done", inputs / "runs" / "on")
    lines = rows_of(run.path / "metrics.jsonl")
    assert list(run.metrics["train/loss"]) == [line["train/loss"] for line in lines]
    assert list(run.metrics["step"]) == [1, 2, 3, 4, 5, 6]
    assert list(run.eval["step"]) == [0, 4, 6]
    assert run.summary == run.facts["summary"]
    assert run.summary["end_chosen"] == run.eval["displacement/chosen"].iloc[-1]
    assert run.config.optim.lr == 0.02
    assert Path(run.config.data.path or "").parent == cache_dir() / "pairs"
    kinds = run.metrics.dtypes
    assert kinds["step"].kind == "i" and kinds["band/lower"].kind == "f"  # noqa: PT018


def test_infinities_and_nan_are_numbers(run: rcpo.Run, tmp_path: Path) -> None:
    """And what a running run appends is seen; a table is the caller's own."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.yaml").write_text((run.path / "config.yaml").read_text())
    rows = '{"step": 1, "a": "inf", "b": null}\n{"step": 2, "a": "-inf", "c": 3}\n'
    (copy / "metrics.jsonl").write_text(rows)
    opened = rcpo.open_run(copy)
    table = opened.metrics
    assert list(table["a"]) == [math.inf, -math.inf]
    assert table["b"].isna().all()
    table["a"] = 0
    with (copy / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "a": 5}\n{"step": 4, "a"')
    assert list(opened.metrics["a"]) == [math.inf, -math.inf, 5]
    assert list(opened.eval.columns) == ["step"]
    assert opened.status == "unknown"


def test_pairs_have_their_words_and_their_change(run: rcpo.Run, inputs: Path) -> None:
    held_out = rows_of(inputs / "held-out.jsonl")
    table = run.pairs
    for part in ("prompt", "chosen", "rejected"):
        assert list(table[part]) == [row[part] for row in held_out]
    end = run.eval.iloc[-1]
    assert table["r_w"].mean() == pytest.approx(end["displacement/chosen"], abs=1e-5)
    assert table["r_l"].mean() == pytest.approx(end["displacement/rejected"], abs=1e-5)
    assert table["z_w"].mean() == pytest.approx(end["logps/chosen"], rel=1e-6)


def test_pairs_whose_data_is_gone_have_numbers_alone(off: rcpo.Run, inputs: Path) -> None:
    path = inputs / "held-out.jsonl"
    text = path.read_text()
    path.unlink()
    try:
        table = off.pairs
    finally:
        path.write_text(text)
    assert table["prompt"].isna().all()
    assert "no such file" in table.attrs["no_text"]
    assert len(table) == 6


def test_pairs_whose_data_has_changed_have_numbers_alone(off: rcpo.Run, inputs: Path) -> None:
    """The rows that the run has noted hold other words now."""
    path = inputs / "held-out.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::-1]))
    try:
        table = off.pairs
    finally:
        path.write_text("".join(lines))
    assert table["prompt"].isna().all()
    assert "has changed since the run measured its held-out pairs" in table.attrs["no_text"]
    assert not off.pairs["prompt"].isna().any()


def test_the_model_is_the_trained_one(run: rcpo.Run) -> None:
    """z of the held-out pairs under model() is what the run measured at its end."""
    pairs = read_inputs(run.config).held_out
    with torch.no_grad():
        z = summed(run.model().float(), list(pairs))
    assert z.z_w.tolist() == pytest.approx(list(run.pairs["z_w"]), abs=1e-4)
    assert run.tokenizer().decode([5, 6]) == "w5 w6"


def test_it_says_itself_in_one_line(run: rcpo.Run) -> None:
    end = run.summary
    assert repr(run) == (
        f"<rcpo.Run on: dpo, calibration on, done at step 6; held-out chosen {end['end_chosen']:+.2f}, "
        f"rejected {end['end_rejected']:+.2f} nats, accuracy {end['end_accuracy']:.2f}>"
    )
    shown = run._repr_html_()
    assert shown.startswith("<b>on</b>: dpo, calibration on, done")
    assert "data:image/png;base64," in shown


def test_a_calibrator_in_another_loop_has_the_runs_alpha(run: rcpo.Run) -> None:
    """The same tiny model and batches through `rcpo.Calibrator`: alpha, norms and cosine of every step to
    fp32 rounding."""
    config = run.config
    inputs = read_inputs(config)
    sampler = inputs.sampler(config)
    start, model = (
        AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="eager").float()
        for _ in range(2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    calibrator = rcpo.Calibrator("on", "dpo", head=model.get_output_embeddings(), every=1)
    for step in range(6):
        indices = sampler.global_batch(step)
        for half in (indices[:4], indices[4:]):
            batch = [inputs.train[idx] for idx in half]
            with torch.no_grad():
                ref = summed(start, batch)
            lengths = (
                torch.tensor([side.num_tokens - side.num_prompt for side in sides])
                for sides in zip(*((pair.chosen, pair.rejected) for pair in batch), strict=True)
            )
            (calibrator.surrogate(*summed(model, batch), *ref, *lengths) / 2).backward()
        row = calibrator.update()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        logged = run.metrics.iloc[step]
        for key in set(row) - (OF_SIGNS if step == 0 else set()):
            assert row[key] == pytest.approx(logged[key], rel=2e-4, abs=2e-5), (step, key)
    assert len(set(run.metrics["calibration/alpha"])) == 6


# The process


def test_the_process_is_afterwards_as_it_was(inputs: Path, tmp_path: Path) -> None:
    """Signals, loggers, warnings, random numbers, hooks, variables, and the user's own Hydra."""
    GlobalHydra.instance().clear()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "c.yaml").write_text("a: 3\n")
    heard = []
    saved = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    root = logging.getLogger()

    def state() -> list[Any]:
        return [
            *(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)),
            list(root.handlers), root.level, list(logging.getLogger("rcpo").handlers), list(warnings.filters),
            warnings.showwarning, sys.excepthook, dict(os.environ), list(sys.argv), list(sys.path),
            os.getcwd(),
            torch.backends.cuda.matmul.allow_tf32, torch.random.get_rng_state().tolist(),
        ]  # fmt: skip

    try:
        with hydra.initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
            before = state()
            rcpo.train(
                *WORDS, "train.steps=1", f"model.path={inputs / 'neox'}", f"run_dir={tmp_path / 'run'}",
                "data.eval_pairs=4", pairs=rows_of(inputs / "train.jsonl"),
            )  # fmt: skip
            assert state() == before
            assert hydra.compose("c").a == 3
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, saved)
    assert not torch.distributed.is_initialized()


def test_another_thread_may_train_and_two_at_once_may_not(inputs: Path, tmp_path: Path) -> None:
    words = (
        *WORDS, f"model.path={inputs / 'neox'}", "data.eval_pairs=4", "train.steps=2",
    )  # fmt: skip
    made: list[Any] = []

    class Rows:
        """Gives its rows when the other thread has been refused."""

        def __iter__(self) -> Iterator[dict[str, str]]:
            with pytest.raises(rcpo.UserError, match="another run trains in this process"):
                rcpo.train(*words)
            yield from rows_of(inputs / "train.jsonl")

    def work() -> None:
        made.append(rcpo.train(*words, f"run_dir={tmp_path / 'run'}", pairs=Rows()))  # type: ignore[arg-type]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert made[0].status == "done"


def test_ranks_of_somebody_elses_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(rcpo.UserError, match="is in a process group already"):
            rcpo.train("train.steps=1")
    finally:
        torch.distributed.destroy_process_group()
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "2")
    with pytest.raises(rcpo.UserError, match="starts its own ranks, and torchrun or srun started 2"):
        rcpo.train("train.steps=1")


# What stops a run


def test_lost_numbers_are_raised_and_recorded(inputs: Path, tmp_path: Path) -> None:
    words = (*WORDS, f"model.path={inputs / 'neox'}", "optim.lr=1e38", f"run_dir={tmp_path / 'run'}")
    with pytest.raises(rcpo.NonFiniteError) as caught:
        rcpo.train(*words, "train.grad_clip=0", "data.eval_pairs=4", pairs=rows_of(inputs / "train.jsonl"))
    run = rcpo.open_run(tmp_path / "run")
    assert (run.status, run.facts["exit_reason"]) == ("failed", str(caught.value))
    with pytest.raises(rcpo.UserError, match=r"has no final/, its status is failed; go on with run.resume"):
        run.model()
    assert "failed at step 1" in repr(run)


def test_ctrl_c_stops_it_and_resume_goes_on(
    inputs: Path, tmp_path: Path, run: rcpo.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after step 5 with a checkpoint of step 4: the rows of the run that was not."""
    from rcpo.monitor.sinks import JsonlSink

    log_step = JsonlSink.log_step

    def interrupt(sink: JsonlSink, row: dict[str, float]) -> None:
        log_step(sink, row)
        if row["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(JsonlSink, "log_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rcpo.train(
            *WORDS, f"model.path={inputs / 'llama-tied'}", "objective=dpo", "calibration=on",
            "calibration.every=1", "train.save_every=2", f"run_dir={tmp_path / 'run'}",
            pairs=rows_of(inputs / "train.jsonl"), held_out=rows_of(inputs / "held-out.jsonl"),
        )  # fmt: skip
    monkeypatch.undo()
    again = rcpo.open_run(tmp_path / "run")
    assert again.status == "interrupted"
    assert again.resume() is again
    assert again.status == "done"
    for key in ("train/loss", "calibration/alpha", "logps/rejected"):
        assert list(again.metrics[key]) == list(run.metrics[key])
    assert again.resume().facts["num_resumed"] == 1, "one that is done is left as it is"


@pytest.mark.ci("real processes")
@pytest.mark.timeout(180)
def test_several_ranks_are_processes_of_their_own_and_import_the_users_module(
    inputs: Path, tmp_path: Path
) -> None:
    """Two ranks on an objective from a file that loses its numbers: what stops them is raised here."""
    module = tmp_path / "my_losses.py"
    module.write_text(LOSS)
    with pytest.raises(rcpo.NonFiniteError, match="not finite"):
        rcpo.train(
            *WORDS, f"model.path={inputs / 'neox'}", f"objective.module={module}", "objective=my_loss",
            "launch.processes=2", "data.eval_pairs=4", f"run_dir={tmp_path / 'run'}",
            pairs=rows_of(inputs / "train.jsonl"),
        )  # fmt: skip
    run = rcpo.open_run(tmp_path / "run")
    assert (run.status, run.facts["world_size"], run.config.objective["name"]) == ("failed", 2, "my_loss")


def test_an_objective_of_this_process_is_not_for_others(tmp_path: Path) -> None:
    from rcpo.objectives.registry import OWN

    @rcpo.objectives.register("here_alone", needs_reference=True)
    def here_alone(pair: Any, config: Any) -> torch.Tensor:
        return -pair.margin()

    try:
        with pytest.raises(
            rcpo.UserError, match=r"^objective=here_alone: is registered in this process alone"
        ):
            rcpo.train("objective=here_alone", "launch.processes=2", f"run_dir={tmp_path / 'run'}")
    finally:
        del OWN["here_alone"]
    assert not (tmp_path / "run").exists()


# Sweeps and comparisons


def test_runs_are_compared_as_on_the_command_line(run: rcpo.Run, off: rcpo.Run, tmp_path: Path) -> None:
    found = rcpo.compare([run, off.path])
    assert sorted(found.table["calibration"]) == ["off", "on"]
    chosen = found.table.set_index("calibration")["chosen"]
    assert chosen["on"] == run.eval["displacement/chosen"].iloc[-1]
    first = as_csv(found._lines, found._compared, make_view(found._lines, found._compared)).splitlines()[0]
    assert list(found.records.columns) == first.split(",")
    assert found.markdown() == repr(found) == found._repr_markdown_()
    assert found.left_out == []
    assert "<html" in found.html(tmp_path / "sub" / "report.html", ches="no").read_text()
    assert len(rcpo.compare(run.path.parent, where="calibration=on").table) == 1
    with pytest.raises(rcpo.UserError, match="compare: names no run"):
        rcpo.compare([])


def test_a_sweep_has_its_cells(inputs: Path, tmp_path: Path) -> None:
    """Two cells, frozen; one is run from here."""
    file = tmp_path / "grid.yaml"
    words = [
        *WORDS, f"model.path={inputs / 'neox'}", "data=file", f"data.path={inputs / 'train.jsonl'}",
        f"data.eval_path={inputs / 'held-out.jsonl'}",
    ]  # fmt: skip
    file.write_text(json.dumps({"overrides": words, "axes": {"calibration": ["off", "on"]}}))
    folder = SweepFolder(tmp_path / "out")
    folder.path.mkdir()
    definition = read_definition(str(file))
    write_growth(folder, definition, plan_growth(definition, folder, Here()))
    sweep = rcpo.open_sweep(folder.path)
    assert repr(sweep) == "<rcpo.Sweep out: 2 cells, 2 pending>"
    assert len(sweep["on"].run.resume().metrics) == 6
    assert [(cell.name, cell.state, cell.step, cell.axes) for cell in sweep] == [
        ("off", "pending", 0, {"calibration": "off"}), ("on", "done", 6, {"calibration": "on"}),
    ]  # fmt: skip
    assert sweep["on"].words == [*words, "calibration=on"]
    assert list(sweep.table["state"]) == ["pending", "done"]
    assert list(sweep.table.columns) == ["name", "calibration", "state", "step", "loss", "chosen"]
    assert len(sweep.compare().left_out) == 1
    with pytest.raises(rcpo.UserError, match=r"^nope: .* has no such cell"):
        sweep["nope"]


def test_folders_that_are_none_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(rcpo.UserError, match=r"is not a run folder \(it has no config.yaml\)"):
        rcpo.open_run(tmp_path)
    with pytest.raises(rcpo.UserError, match=r"is not a sweep folder \(it has no manifest.jsonl\)"):
        rcpo.open_sweep(tmp_path)
