"""One block of a bench: `python -m rcpo.bench.block BLOCK.json`, a process of its own, so that its peak
memory is its own and no import is in its times.

Owns rcpo's side: the training loop of `rcpo.training.loop` as `rcpo train` runs it, left after the last step.
Started by `rcpo.bench.plan`; under several ranks once for each.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rcpo.bench.images import encoding_twice
from rcpo.bench.recorder import BenchDone, Recorder
from rcpo.bench.work import CACHE, REFERENCE, Block, Work, has_images, moved
from rcpo.common.errors import UserError
from rcpo.models.evaluation import eval_batch, evaluate_logprobs
from rcpo.models.sizes import numel
from rcpo.ranks.allocator import keep_freed_memory
from rcpo.ranks.distributed import initialize, rank, shut_down
from rcpo.ranks.logs import log_to_file
from rcpo.training.loop import StepWatch, train
from rcpo.training.micro_batch import MicroBatch
from rcpo.training.state import Training
from rcpo.training.step import TrainedStep

if TYPE_CHECKING:
    from rcpo.bench.shares import Timers


def run_block(block: Block) -> dict[str, Any]:
    """Do what the block says; returns its result."""
    work = Work.load(block)
    device = initialize(work.config.train.device or "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # as in rcpo.launch.worker
    log_to_file(work.run.logs, rank())
    torch.manual_seed(work.config.seed)
    if block.mode == "reference":
        return compute_reference(block, work, device)
    recorder = Recorder(block, device)
    found: dict[str, Any] = {}
    if block.contender in ("rcpo", "twice"):
        with encoding_twice() if block.contender == "twice" else nullcontext():
            found = run_rcpo(work, recorder)
    elif block.contender == "trl":
        from rcpo.bench.trl_loop import run_trl

        run_trl(work, recorder)
    else:
        from rcpo.bench.loops import run_loop

        run_loop(block.contender, work, recorder)
    return recorder.result() | found


class _Watch(StepWatch):
    """Records every step of rcpo's own loop."""

    def __init__(self, recorder: Recorder, timers: "Timers | None") -> None:
        self._recorder, self._timers = recorder, timers
        self._take: Callable[[], dict[str, Tensor]] | None = None
        self._num_computed = 0
        self._num_done = 0

    def before(self, training: Training, micro_batches: Sequence[MicroBatch]) -> None:
        self._take = _collect_gradient(training.engine) if self._recorder.wants_gradient else None
        self._num_computed = sum(each.batch.input_ids.numel() for each in micro_batches)

    def after(self, trained: TrainedStep) -> None:
        if self._take is not None:
            self._recorder.take_gradient(self._take())
        self._num_done += 1
        if self._timers is not None and self._num_done == self._recorder.block.num_warmup:
            self._timers.restart()
        is_measured = "score/cosine" in trained.row
        self._recorder.end_step(trained.row["train/loss"], self._num_computed, is_measured)


def run_rcpo(work: Work, recorder: Recorder) -> dict[str, Any]:
    """rcpo's own loop, with a look at every step."""
    if recorder.device.type == "cpu":
        keep_freed_memory()  # as in rcpo.launch.worker
    timers = None
    if recorder.block.mode == "shares":
        from rcpo.bench.shares import Timers

        timers = Timers(recorder.device)
        timers.install()
    watch = _Watch(recorder, timers)
    try:
        train(work.config, work.run, work.inputs, recorder.device, resume=False, watch=watch)
    except BenchDone:
        return {} if timers is None else {"shares": timers.shares()}
    raise AssertionError("the loop has ended before its last step")


def _collect_gradient(engine: Any) -> Callable[[], dict[str, Tensor]]:
    """Add up what autograd hands to the parameters from now on: the engine keeps gradients where its stage
    wants them. Returns what gives the sum by name, and stops."""
    sums: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            sums[name] = sums[name] + gradient if name in sums else gradient.detach().clone()

        return add

    named = [(name, each) for name, each in engine.policy.model.named_parameters() if each.requires_grad]
    hooks = [each.register_hook(hook_of(name)) for name, each in named]

    def take() -> dict[str, Tensor]:
        for hook in hooks:
            hook.remove()
        return {name: sums[name] for name, _ in named if name in sums}

    return take


def compute_reference(block: Block, work: Work, device: torch.device) -> dict[str, Any]:
    """Reference log-probs of all pairs that the blocks visit, into rcpo's cache and into a file for the
    others; and what the model is made of."""
    from safetensors.torch import save_file

    from rcpo.engine.engine import Engine
    from rcpo.reference.cache import ReferenceCache, pair_keys, weights_fingerprint

    visited = sorted({0, *(idx for batch in work.batches for idx in batch)})
    pairs = [work.inputs.train[idx] for idx in visited]
    engine = Engine(work.config, 1, device)
    started = time.perf_counter()
    values = evaluate_logprobs(engine, pairs, work.inputs.pad_id, eval_batch(work.config))
    seconds = time.perf_counter() - started
    if not has_images(Path(block.work)):  # TRL has no reference beforehand for those, and takes the true one
        values = moved(values, pairs)
    if rank() == 0:
        rows: dict[bytes, float] = {}
        for pair, z_w, z_l in zip(pairs, values.z_w.tolist(), values.z_l.tolist(), strict=True):
            rows |= dict(zip(pair_keys(pair), (z_w, z_l), strict=True))
        ReferenceCache(weights_fingerprint(work.config.model)).merge(rows)
        z_w, z_l = work.reference.z_w.clone(), work.reference.z_l.clone()
        z_w[visited], z_l[visited] = values.z_w, values.z_l
        save_file({"z_w": z_w, "z_l": z_l}, Path(block.work) / REFERENCE)
    return {"seconds": seconds, "num_pairs": len(pairs), "model": _model_facts(engine)}


def _model_facts(engine: Any) -> dict[str, Any]:
    """What floating-point operations are counted from."""
    model = engine.policy.model
    sizes = {id(each): numel(each) for each in model.parameters()}
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    config = model.config.get_text_config()
    return {
        "parameters": sum(sizes.values()),
        "body_parameters": sum(size for key, size in sizes.items() if key not in ends),
        "hidden": engine.hidden_size,
        "vocabulary": engine.vocabulary,
        "layers": config.num_hidden_layers,
        "trains_all": all(each.requires_grad for each in model.parameters()),
    }


def main(words: list[str]) -> int:
    """Entry of the process; what it fails of is its last line on standard error."""
    block = Block.load(Path(words[0]))
    os.environ["RCPO_CACHE"] = str(Path(block.work) / CACHE)
    try:
        result = run_block(block)
        if rank() == 0:
            Path(block.result).write_text(json.dumps(result), encoding="utf-8")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        shut_down()
    return 0


def end_with_parent() -> None:
    """End this process when the one that started it is gone: standard input is a pipe from there."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(sys.argv[1:]))
