"""Many runs in few processes: tests give a list of configs, ranks train them one after another.

`python rank_runs.py JOBS` is one rank. It imports everything once and then forks a process for each job,
which trains a run folder's frozen config with `rcpo.training.loop.train`, as `rcpo.launch.worker` does; a job
may be killed at a given moment. `do_jobs` starts the ranks, and ends all of them when one fails or time is
up."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rcpo.training.checkpoint
import rcpo.training.loop
from helpers.plain_loop import PlainRun, Settings, Steering, train_plainly
from helpers.tiny_models import MODELS, VOCABULARY
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.monitor.sinks import JsonlSink
from rcpo.ranks.distributed import free_port, initialize, rank, shut_down, world_size
from rcpo.ranks.environment import RANK_VARIABLES
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree, open_run
from rcpo.training.loop import train
from rcpo.training.read_inputs import read_inputs
from rcpo.training.state import Training
from rcpo.training.step import MicroBatch

Moment: TypeAlias = Literal["row", "checkpoint", "export", "signal", "nan"]

PAIRS_PER_STEP, NUM_STEPS = 8, 6
RELEASING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO-3 settings that shard and release even parameters this small; by default they stay gathered."""


@dataclass(frozen=True)
class Case:
    """What is trained; how it is spread over ranks and micro-batches is none of its business."""

    objective: str
    calibration: str
    model: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.objective}-{self.calibration}-{self.model}-{self.optimizer}"

    @property
    def lr(self) -> float:
        return 0.02 if self.optimizer == "sgd" else 0.003


@dataclass(frozen=True)
class Layout:
    ranks: int
    pairs_per_device: int
    stage: int = 1

    def __str__(self) -> str:
        accumulation = PAIRS_PER_STEP // self.ranks // self.pairs_per_device
        return f"{self.ranks}ranks-{self.pairs_per_device}x{accumulation}-zero{self.stage}"


def write_inputs(folder: Path) -> None:
    """Every tiny model with a tokenizer of words "w3" ... "w36" (ids 3 ... 36), and pairs of ragged
    lengths: 20 to train on (so that step 3 starts a second pass), 6 held out."""
    names = ["<pad>", "<s>", "</s>", *(f"w{idx}" for idx in range(3, VOCABULARY))]
    words = Tokenizer(WordLevel({name: idx for idx, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(5)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randint(shortest, longest)))

    for name, num_pairs in (("train", 20), ("held-out", 6)):
        rows = [
            {"prompt": text(1, 4), "chosen": " " + text(1, 7), "rejected": " " + text(1, 7)}
            for _ in range(num_pairs)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(inputs: Path, run_dir: Path, case: Case, layout: Layout, *words: str) -> ResolvedConfig:
    """The config as the command line makes it; `words` are further overrides."""
    own = [
        f"objective={case.objective}", f"calibration={case.calibration}", f"optim={case.optimizer}",
        f"optim.lr={case.lr}", *(["optim.eps=1e-4"] if case.optimizer == "adamw" else []),
        f"model.path={inputs / case.model}", "data=file", f"data.path={inputs / 'train.jsonl'}",
        f"data.eval_path={inputs / 'held-out.jsonl'}", "tracking=none", f"run_dir={run_dir}",
        f"train.steps={NUM_STEPS}", f"train.pairs_per_step={PAIRS_PER_STEP}", "train.device=cpu",
        f"train.pairs_per_device={layout.pairs_per_device}", f"launch.processes={layout.ranks}",
        f"deepspeed.stage={layout.stage}", "train.eval_every=4",
    ]  # fmt: skip
    tree = compose([*own, *words])
    assert tree is not None
    if layout.stage == 3:
        tree["deepspeed"]["extra"] = {"zero_optimization": RELEASING}
    return resolve(validate(tree), None)


def make_run(config: ResolvedConfig) -> RunFolder:
    assert config.run_dir is not None
    run = RunFolder(config.run_dir)
    run.create(config, config_tree(config))
    return run


@dataclass(frozen=True)
class Job:
    """One training of a run folder by all ranks."""

    run: str
    resume: bool = False
    killed_at: tuple[Moment, int] | None = None
    """row, checkpoint, export: rank 0 ends itself with SIGKILL when the row of that step is written, when the
    checkpoint of that step is whole but not yet in its place, or when final/ is. signal: rank 0 alone gets
    SIGTERM when that row is written. nan: the last rank's last pair loses its reference in that step."""
    killed_after_seconds: float | None = None
    """Rank 0 is sent SIGKILL so long after its process was forked; it may be done by then. `seconds_file`
    says how long it took."""
    lost_at: int | None = None
    """The last rank's last pair loses its reference in that step, and the run is to go on."""
    port: int = 0


def train_all(runs: Sequence[RunFolder], num_ranks: int, timeout_seconds: float) -> None:
    """Train every run from its start to its end."""
    do_jobs([Job(str(run.path)) for run in runs], num_ranks, timeout_seconds)


def do_jobs(jobs: Sequence[Job], num_ranks: int, timeout_seconds: float) -> None:
    """Do the jobs in turn on `num_ranks` processes; an AssertionError shows the output of one that failed."""
    shared = dict(zip(RANK_VARIABLES, ("", str(num_ranks), "", "127.0.0.1", ""), strict=True))
    folder = Path(jobs[0].run).parent
    written = json.dumps([asdict(replace(job, port=free_port())) for job in jobs])
    processes, logs = [], []
    try:
        for number in range(num_ranks):
            logs.append(folder / f"ranks-{num_ranks}-{number}.log")
            env = os.environ | shared | {"RANK": str(number), "LOCAL_RANK": str(number)}
            env |= {"RCPO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
            command = [sys.executable, __file__, written]
            with logs[-1].open("wb") as log:
                # A session of its own: its children can be ended with it.
                processes.append(
                    subprocess.Popen(
                        command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                    )
                )
        deadline = time.monotonic() + timeout_seconds
        while any(process.poll() is None for process in processes):
            failed = [number for number, process in enumerate(processes) if process.poll()]
            assert not failed, logs[failed[0]].read_text()[-4000:]
            assert time.monotonic() < deadline, "\n".join(log.read_text()[-2000:] for log in logs)
            time.sleep(0.05)
        for process, log in zip(processes, logs, strict=True):
            assert process.returncode == 0, log.read_text()[-4000:]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl but for what a clock or the memory decides."""
    rows = run.rows(run.metrics)
    return [{key: value for key, value in row.items() if not key.startswith("speed/")} for row in rows]


def final_weights(run: RunFolder) -> dict[str, Tensor]:
    return load_file(run.final / "model.safetensors")


def plain_run(config: ResolvedConfig) -> PlainRun:
    """The same training by `plain_loop`, from the tokenised pairs and the data order of the config."""
    case = config.objective["name"], config.calibration.name, config.optim.name
    band = config.calibration
    inputs = read_inputs(config)
    sampler = inputs.sampler(config)
    settings = Settings(
        *case, config.optim.lr, config.train.grad_clip, band.scope, band.estimator, band.every,
        band.warmup_steps, band.ema_beta,
        config.objective["dro_lambda"] if config.objective["aggregate"] == "kl_dro" else None,
        band.alpha, _steering(config, sampler.num_fresh_steps),
    )  # fmt: skip
    batches = [sampler.global_batch(step) for step in range(inputs.num_steps(config))]
    model = AutoModelForCausalLM.from_pretrained(config.model.path, attn_implementation="eager")
    probe = inputs.held_out[: band.feedback.pairs]
    return train_plainly(model.float(), inputs.train, batches, settings, probe)


def _steering(config: ResolvedConfig, num_fresh_steps: int) -> Steering | None:
    loop = config.calibration.feedback
    if config.calibration.name != "feedback":
        return None
    high = config.calibration.max_log_alpha if loop.high is None else loop.high
    return Steering(
        loop.gain, loop.integral_gain, loop.smoothing, loop.low, high, loop.every,
        num_fresh_steps if loop.source == "batch" else 0,
    )  # fmt: skip


def assert_equals_plain(run: RunFolder, plain: PlainRun, tolerance: float) -> None:
    """Weights of final/ as transformers loads them to `tolerance` absolute; every number that the plain loop
    knows to 1e-4 relative."""
    weights = dict(AutoModelForCausalLM.from_pretrained(run.final).named_parameters())
    assert set(weights) == set(plain.weights)
    for name, weight in weights.items():
        expected = plain.weights[name]
        torch.testing.assert_close(weight, expected, atol=tolerance, rtol=0, msg=f"{run.path}: {name}")
    rows = metrics(run)
    assert len(rows) == len(plain.rows)
    for row, expected in zip(rows, plain.rows, strict=True):
        for key, value in expected.items():
            assert abs(row[key] - value) <= 1e-4 * abs(value) + 2e-5, (
                run.path,
                row["step"],
                key,
                row[key],
                value,
            )


SIGNS = {f"displacement/{name}" for name in ("accuracy", "chosen_down", "both_down")} | {"dynamics/pathway"}
"""Counts of signs: in step 1, where r = z - ref is rounding alone (and with it apo_down's d_w), they tell
nothing."""


def assert_equal_rows(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """The same keys in every row, values to fp32 tolerance."""
    assert [list(row) for row in left] == [list(row) for row in right]
    for one, other in zip(left, right, strict=True):
        for key in set(one) - (SIGNS if one["step"] == 1 else set()):
            torch.testing.assert_close(
                other[key], one[key], rtol=2e-4, atol=2e-5, equal_nan=True, msg=f"{one['step']} {key}"
            )


def die_at(moment: Moment, step: int) -> None:
    """Arrange for this run to be stopped."""
    number = signal.SIGTERM if moment == "signal" else signal.SIGKILL

    def kill_when(is_due: bool) -> None:
        if is_due:
            os.kill(os.getpid(), number)

    if moment == "nan":
        lose_a_number_at(step)
        return
    if rank() != 0:
        return
    if moment in ("row", "signal"):
        log_step = JsonlSink.log_step

        def log_step_and_die(sink: JsonlSink, row: dict[str, float]) -> None:
            log_step(sink, row)
            kill_when(row["step"] == step)

        JsonlSink.log_step = log_step_and_die  # type: ignore[method-assign]
        return
    if moment == "export":
        card = rcpo.training.loop.model_card

        def die_before_the_model_is_in_place(*args: Any) -> str:
            kill_when(True)
            return card(*args)

        rcpo.training.loop.model_card = die_before_the_model_is_in_place
        return
    complete = rcpo.training.checkpoint._complete

    def die_before_completing(beside: Path, place: Path) -> None:
        kill_when(place.name == f"step-{step:06d}")
        complete(beside, place)

    rcpo.training.checkpoint._complete = die_before_completing


def lose_a_number_at(step: int) -> None:
    """Let the last rank's last pair have no reference in that step, as a damaged cache would."""
    micro_batches = rcpo.training.loop._micro_batches

    def with_nan(training: Training, may_join: bool) -> list[MicroBatch]:
        batches = micro_batches(training, may_join)
        if training.state.step + 1 == step and rank() == world_size() - 1:
            ref_w = batches[-1].ref_w.clone()
            ref_w[-1] = math.nan
            batches[-1] = batches[-1]._replace(ref_w=ref_w)
        return batches

    rcpo.training.loop._micro_batches = with_nan


def do_job(job: Job) -> None:
    """One rank's part of a job, in a process of its own."""
    os.environ["MASTER_PORT"] = str(job.port)
    device = initialize("cpu")
    if job.killed_at is not None:
        die_at(*job.killed_at)
    if job.lost_at is not None:
        lose_a_number_at(job.lost_at)
    run, config = open_run(job.run)
    train(config, run, read_inputs(config), device, job.resume)
    if rank() == 0:
        run.update_run(status="done")
    shut_down()


def seconds_file(job: Job) -> Path:
    """Where a job with `killed_after_seconds` leaves how long it took."""
    return Path(f"{job.run}.seconds")


def kill_after(child: int, seconds: float, others: Path | None = None) -> float:
    """Wait for the child, and end it when it takes longer, or 5 seconds after `others` has appeared; however
    it ends is fine. Returns its seconds."""
    started = time.monotonic()
    limit = seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if others is not None and limit == math.inf and others.exists():
            limit = time.monotonic() - started + 5  # it may wait for a rank that never came up
        if time.monotonic() - started >= limit:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.002)
    return time.monotonic() - started


def main(jobs: list[Job]) -> int:
    """One rank; returns the exit code."""
    for job in jobs:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                do_job(job)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        if job.killed_after_seconds is not None:
            if os.environ["RANK"] == "0":
                seconds = kill_after(child, job.killed_after_seconds)
                seconds_file(job).write_text(str(seconds))
            else:
                kill_after(child, math.inf, seconds_file(job))
            continue
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        # Of a killed job, rank 0 is killed and the others fail.
        if (code == 0) == (job.killed_at is not None):
            print(f"{job} ended with {code}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main([Job(**fields) for fields in json.loads(sys.argv[1])]))
