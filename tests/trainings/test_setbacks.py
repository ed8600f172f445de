"""Numbers that are not finite, checkpoints that cannot be written, and memory that runs out: real runs with
the fault in them."""

import logging
import math
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.forked import in_a_fork
from helpers.rank_runs import Job, do_jobs, lose_a_number_at, train_here
from helpers.same_run import final_weights, metrics
from helpers.selection import asked_for, matrix
from rcpo.common.errors import NonFiniteError, SaveError, UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch
from rcpo.data.sampler import PairSampler
from rcpo.engine.memory import in_words, memory_budget, shown
from rcpo.models.load import load_model
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.read_inputs import read_inputs
from rcpo.training.rehearsal import largest_micro_batch
from rcpo.training.state import Training

CASE = Case("bco", "on", "llama-tied", "adamw")
SKIP = ("train.on_nonfinite=skip", "train.save_every=1", "optim.schedule=linear")
LAYOUTS = (*(Layout(1, 4, stage) for stage in (0, 1, 2, 3)), Layout(2, 2, 2), Layout(2, 2, 3))
ALWAYS = (LAYOUTS[0], LAYOUTS[2], LAYOUTS[5])
"""ZeRO 0 and 2 on one rank, 3 on two."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def skipped(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Layout, RunFolder]:
    """Six steps whose third has a pair without a reference on the last rank, left out."""
    folder, asked = tmp_path_factory.mktemp("skipped"), asked_for(request)
    runs = {
        layout: make_run(make_config(inputs, folder / str(layout), CASE, layout, *SKIP))
        for layout in LAYOUTS
        if layout == LAYOUTS[0] or {"layout": layout} in asked
    }
    for num_ranks in (1, 2):
        jobs = [Job(str(run.path), lost_at=3) for layout, run in runs.items() if layout.ranks == num_ranks]
        do_jobs(jobs, num_ranks, 200)
    return runs


@pytest.mark.timeout(400)
@pytest.mark.parametrize("layout", matrix(LAYOUTS, ALWAYS.__contains__, "rows of matrices"), ids=str)
def test_a_lost_step_is_left_out_counted_and_touches_nothing(
    layout: Layout, skipped: dict[Layout, RunFolder]
) -> None:
    """Weights, calibrator and batch statistics after step 3 are those after step 2; every step has its row,
    the schedule goes on, and all later numbers are finite and the same at every ZeRO stage."""
    run = skipped[layout]
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/nonfinite_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [math.isfinite(row["train/loss"]) for row in rows] == [True, True, False, True, True, True]
    assert [row["train/lr"] for row in rows] == pytest.approx([CASE.lr * (6 - step) / 6 for step in range(6)])
    before, after = (run.checkpoints / f"step-{step:06d}" for step in (2, 3))
    weights = load_file(before / "model" / "model.safetensors")
    for name, weight in load_file(after / "model" / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    states = [(path / "state.json").read_text().replace('"step": 3', '"step": 2') for path in (before, after)]
    assert states[1] == states[0].replace('"num_nonfinite_steps": 0', '"num_nonfinite_steps": 1')
    (lost,) = run.read_run()["nonfinite"]
    assert (lost["step"], lost["rank"], len(lost["rows"])) == (3, layout.ranks - 1, layout.pairs_per_device)
    for name, weight in final_weights(run).items():
        torch.testing.assert_close(weight, final_weights(skipped[LAYOUTS[0]])[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("stage", matrix([0, 1, 2, 3], (2).__eq__, "rows of matrices"))
def test_a_lost_gradient_stops_before_the_weights_change(inputs: Path, tmp_path: Path, stage: int) -> None:
    """Every loss is finite, one entry of one gradient of the second micro-batch is not (as from a faulty
    kernel): NonFiniteError names that micro-batch's rows alone, and the checkpoint has the initial weights,
    bit for bit."""
    run = make_run(make_config(inputs, tmp_path / "run", CASE, Layout(1, 4, stage)))

    def work() -> None:
        import rcpo.training.loop as loop

        _, config = open_run(str(run.path))
        read = read_inputs(config)
        *_, rows = (
            [read.train[idx].row for idx in part] for part in read.sampler(config).micro_batches(0, 0, 1, 4)
        )
        build, make = loop.Measurements, loop.micro_batches_of
        second: list[MicroBatch] = []
        at_work: list[PairBatch] = []

        def with_fault(config: ResolvedConfig, engine: loop.Engine, slots: int) -> loop.Measurements:
            run_forward = engine.logprobs

            def note(batch: PairBatch) -> torch.Tensor:
                at_work[:] = [batch]
                return run_forward(batch)

            def spoil(gradient: torch.Tensor) -> torch.Tensor:
                spoiled = gradient.clone()
                if second and at_work[0].input_ids is second[0].batch.input_ids:
                    spoiled.view(-1)[0] = math.inf
                return spoiled

            engine.logprobs = note  # type: ignore[method-assign]
            engine.trainable_parameters()[0].register_hook(spoil)  # as if autograd had delivered it so
            return build(config, engine, slots)

        def remember(training: Training, may_join: bool) -> list[MicroBatch]:
            made = make(training, may_join)
            second[:] = made[1:2]
            return made

        loop.Measurements, loop.micro_batches_of = with_fault, remember  # type: ignore[assignment,misc]
        with pytest.raises(NonFiniteError) as caught:
            train_here(run)
        seen = "step 1: a loss, log-probability or gradient is not finite"
        assert f"{seen} (rank 0, rows {rows} of the data)" in str(caught.value)

    in_a_fork(work)
    start = load_model(open_run(str(run.path))[1].model).state_dict()
    for name, weight in load_file(run.checkpoints / "step-000000" / "model" / "model.safetensors").items():
        assert torch.equal(weight, start[name]), name
    assert not run.rows(run.metrics)


def test_the_limit_of_skipped_steps_stops_the_run(inputs: Path, tmp_path: Path) -> None:
    """With train.max_nonfinite_steps=2 the third one is too many; the line says which rule it was."""
    words = ("train.on_nonfinite=skip", "train.max_nonfinite_steps=2")
    run = make_run(make_config(inputs, tmp_path / "run", CASE, Layout(1, 8), *words))

    def work() -> None:
        for step in (1, 2, 4):
            lose_a_number_at(step)
        with pytest.raises(
            NonFiniteError, match=r"max_nonfinite_steps=2 steps were left out before"
        ) as caught:
            train_here(run)
        assert caught.value.exit_code == 3

    in_a_fork(work)
    assert [row["step"] for row in run.rows(run.metrics)] == [1, 2, 3]
    assert [item["step"] for item in run.read_run()["nonfinite"]] == [1, 2, 4]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000003"]


def largest_file(run: RunFolder, step: int) -> int:
    files = (run.checkpoints / f"step-{step:06d}").rglob("*")
    return max(file.stat().st_size for file in files if file.is_file())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", matrix([0, 2, 3], (2).__eq__, "rows of matrices"))
def test_a_checkpoint_that_does_not_fit_is_a_line_and_the_one_before_it_stays(
    inputs: Path, tmp_path: Path, stage: int, caplog: pytest.LogCaptureFixture
) -> None:
    """No file may grow beyond half of the largest one from step 3 on, as on a full disk: the run ends as
    if nothing had been, with a warning for steps 4 and 6; with on_save_error=stop it stops at 4, code 4. Only
    the whole checkpoint of step 2 is left, and resuming from it gives the same weights."""
    words = ("train.save_every=2", "train.grad_clip=0")
    runs = {
        name: make_run(make_config(inputs, tmp_path / name, CASE, Layout(1, 4, stage), *words, *more))
        for name, more in (("whole", ()), ("goes-on", ()), ("stops", ("train.on_save_error=stop",)))
    }

    def with_full_disk(name: str) -> None:
        import rcpo.training.loop

        collate = rcpo.training.loop.micro_batches_of

        def fill(training: rcpo.training.state.Training, may_join: bool) -> object:
            if training.state.step == 2:
                limit = largest_file(runs["whole"], 2) // 2
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if training.state.step == 5 and name == "goes-on":
                assert [path.name for path in runs[name].checkpoints.iterdir()] == ["step-000002"]
            return collate(training, may_join)

        def free(*args: object) -> object:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return finish(*args)

        finish = rcpo.training.loop.finish
        rcpo.training.loop.micro_batches_of, rcpo.training.loop.finish = fill, free  # type: ignore[assignment]
        with caplog.at_level(logging.WARNING, "rcpo.training.setbacks"):
            if name == "goes-on":
                train_here(runs[name])
                said = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING]
                assert len(said) == 2, said
                assert all("could not be written (rank 0:" in line for line in said)
                assert ["of step 4 " in said[0], "of step 6 " in said[1]] == [True, True], said
                assert all("the ones before it are whole; the run goes on" in line for line in said)
            else:
                with pytest.raises(
                    SaveError, match=r"the checkpoint of step 4 could not be written"
                ) as caught:
                    train_here(runs[name])
                assert caught.value.exit_code == 4

    in_a_fork(lambda: train_here(runs["whole"]))
    for name in ("goes-on", "stops"):
        in_a_fork(lambda name=name: with_full_disk(name))  # type: ignore[misc]
        assert [path.name for path in runs[name].checkpoints.iterdir()] == ["step-000002"]
    in_a_fork(lambda: train_here(runs["stops"], resume=True))
    expected = final_weights(runs["whole"])
    for name in ("goes-on", "stops"):
        assert repr(metrics(runs[name])) == repr(metrics(runs["whole"]))
        assert all(torch.equal(weight, expected[key]) for key, weight in final_weights(runs[name]).items())


def test_keep_last_keeps_the_newest(inputs: Path, tmp_path: Path) -> None:
    """A checkpoint a step, two kept."""
    words = ("train.save_every=1", "train.keep_last=2")
    run = make_run(make_config(inputs, tmp_path / "run", CASE, Layout(1, 8), *words))
    in_a_fork(lambda: train_here(run))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000005", "step-000006"]


def test_memory_that_runs_out_does_so_before_the_first_step(inputs: Path, tmp_path: Path) -> None:
    """The address space ends where the largest micro-batch begins: one line with what to type, no row, and no
    checkpoint."""
    run = make_run(make_config(inputs, tmp_path / "run", CASE, Layout(1, 8)))

    def work() -> None:
        import rcpo.training.rehearsal

        lay_out = rcpo.training.rehearsal.lay_out

        def lay_out_and_end_memory(*args: object, may_join: bool) -> object:
            batch = lay_out(*args, may_join=may_join)  # type: ignore[arg-type]
            ids = batch.input_ids.repeat(1, 2000)  # a row of 30,000 tokens
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
            return batch._replace(input_ids=ids)

        rcpo.training.rehearsal.lay_out = lay_out_and_end_memory  # type: ignore[assignment]
        with pytest.raises(
            UserError, match=r"does not fit into memory .*; type train\.pairs_per_device=1"
        ) as caught:
            train_here(run)
        assert caught.value.exit_code == 2

    in_a_fork(work)
    assert not run.rows(run.metrics)
    assert not list(run.checkpoints.iterdir())


def test_a_model_that_does_not_fit_at_all_is_one_line_too(inputs: Path, tmp_path: Path) -> None:
    """Memory that runs out while the engine is made, as a GPU says it."""
    run = make_run(make_config(inputs, tmp_path / "run", CASE, Layout(1, 8)))

    def work() -> None:
        import deepspeed

        def initialize(**_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 29.92 GiB.")

        deepspeed.initialize = initialize
        with pytest.raises(
            UserError, match=r"^model\.path=.*: its weights, .* at deepspeed\.stage=1 on 1 ranks; type deepsp"
        ):
            train_here(run)

    in_a_fork(work)
    assert not run.rows(run.metrics)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_policy_that_disagrees_with_its_reference_at_the_start_is_said(
    inputs: Path, tmp_path: Path, dropout: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an adapter whose B is zero nothing can differ, but for one that an SFT adapter left: dropout of half
    its inputs moves z by more than 0.05 nats, and the likely causes are named, data first; without dropout
    not a word."""
    words = ("model.lora.rank=2", f"model.lora.dropout={dropout}", "train.steps=1")
    run = make_run(make_config(inputs, tmp_path / "run", CASE, Layout(1, 8), *words))

    def work() -> None:
        import rcpo.engine.engine

        load = rcpo.engine.engine.load_model

        def load_trained(*args: object) -> object:
            model = load(*args)  # type: ignore[arg-type]
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter)
            return model

        rcpo.engine.engine.load_model = load_trained  # type: ignore[assignment]
        with caplog.at_level(logging.WARNING, "rcpo.training.rehearsal"):
            train_here(run)
        said = [line.getMessage() for line in caplog.records if line.name == "rcpo.training.rehearsal"]
        assert len(said) == (dropout > 0)
        assert all("policy and reference differ by up to" in line for line in said)
        assert all("dropout (model.lora.dropout, or in the model's config)" in line for line in said)
        assert all(line.index("(data, chat template or tokenizer") < line.index("dropout") for line in said)

    in_a_fork(work)


def test_the_largest_micro_batch_is_found_among_those_of_the_run(inputs: Path, tmp_path: Path) -> None:
    """By brute force over all steps: the widest row decides."""
    config = make_config(inputs, tmp_path / "run", CASE, Layout(1, 2))
    read = read_inputs(config)
    sampler = PairSampler(len(read.train), 8, config.seed)

    def width(indices: list[int]) -> int:
        pairs = [read.train[idx] for idx in indices]
        return max(len(side.input_ids) for pair in pairs for side in (pair.chosen, pair.rejected))

    found = largest_micro_batch(config, read, sampler, 3)
    everything = [batch for step in range(3) for batch in sampler.micro_batches(step, 0, 1, 2)]
    assert found in everything
    assert width(found) == max(map(width, everything))


def test_no_micro_batch_of_later_passes_is_larger_and_a_long_run_takes_no_longer(
    inputs: Path, tmp_path: Path
) -> None:
    """20 pairs, 8 a step: of 10^9 steps the first three are looked at."""
    config = make_config(inputs, tmp_path / "run", CASE, Layout(1, 2))
    read = read_inputs(config)
    sampler = read.sampler(config)
    found = largest_micro_batch(config, read, sampler, 10**9)
    widths = read.train.widths()
    largest = max(
        max(widths[idx] for idx in batch)
        for step in range(50)
        for batch in sampler.micro_batches(step, 0, 1, 2)
    )
    assert max(widths[idx] for idx in found) == largest


@pytest.mark.parametrize("model", ["llama", "neox"])
def test_activations_are_estimated_to_a_factor_of_two(inputs: Path, tmp_path: Path, model: str) -> None:
    """Against what autograd really keeps of a forward pass with 8 rows of 64 tokens, weights left out."""
    config = make_config(
        inputs, tmp_path / "run", Case("dpo", "off", model, "sgd"), Layout(1, 4), "model.attention=sdpa"
    )
    policy = load_model(config.model)
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy.base_model(torch.zeros(8, 64, dtype=torch.int64))
    assert output is not None
    budget = memory_budget(config, policy, 8, 64)
    assert 0.5 < budget["activations"] / sum(kept.values()) < 2


def test_the_budget_adds_up_and_is_read_at_a_glance(inputs: Path, tmp_path: Path) -> None:
    """Full fine-tuning of P fp32 parameters at ZeRO 2 on 2 ranks with AdamW: weights 4 P, gradients 2 P,
    optimizer (2 moments and a copy) 6 P."""
    config = make_config(inputs, tmp_path / "run", CASE, Layout(2, 4, 2))
    policy = load_model(config.model)
    num = sum(parameter.numel() for parameter in policy.parameters())
    budget = memory_budget(config, policy, 8, 64)
    assert (budget["weights"], budget["gradients"], budget["optimizer"]) == (4 * num, 2 * num, 6 * num)
    assert in_words({"weights": 1_500_000, "activations": 2_000_000_000, "reference": 0}) == (
        "weights 1.5 MB, activations about 2 GB, reference 0; together 2 GB"
    )
    assert shown(123_456_789_012) == "123 GB"
