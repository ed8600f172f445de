"""The optimizers behind optim=...: one kernel on GPUs, moments in 8 bits through bitsandbytes, and what is
refused."""

import dataclasses
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rcpo.engine.optimizer
from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.inputs import config_of, fault
from helpers.rank_runs import Job, do_jobs, train_all
from helpers.same_run import final_weights, metrics
from rcpo.common.errors import UserError
from rcpo.engine.engine import deepspeed_config
from rcpo.engine.optimizer import build_optimizer, can_be_fused
from rcpo.engine.schedule import build_schedule
from rcpo.runs.folder import RunFolder
from rcpo.training.checkpoint import refuse_unloadable

EIGHT = {"name": "adamw_8bit"}


def on_cuda(**groups: dict[str, Any]) -> Any:
    """A config for GPUs, made where there is none."""
    config = config_of(**groups)
    object.__setattr__(config.train, "device", "cuda")
    return config


def test_adamw_is_one_kernel_where_weights_and_moments_are_on_a_gpu() -> None:
    """Not on a CPU, whose numbers stay as they are, and not with moments in host memory."""
    assert can_be_fused(on_cuda())
    assert not can_be_fused(config_of())
    assert not can_be_fused(on_cuda(deepspeed={"stage": 2, "offload": "optimizer"}))
    config = config_of(optim={"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.1}).optim
    made = []
    for is_fused in (False, True):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = build_optimizer(config, [parameter], is_fused)
        assert bool(optimizer.defaults["fused"]) == is_fused
        for step in range(4):
            parameter.grad = torch.sin(torch.arange(50.0) + step)
            optimizer.step()
        made.append(parameter.detach())
    torch.testing.assert_close(made[0], made[1], atol=1e-6, rtol=0)


def test_gradients_travel_beside_the_backward_pass_at_stage_2_on_gpus() -> None:
    """Where there are several; DeepSpeed's own default is so at stage 3 alone. What a user says wins."""

    def overlaps(num_gpus: int, stage: int, **extra: Any) -> object:
        launch = {"gpus_per_node": num_gpus} if num_gpus else {"processes": 2}
        config = config_of(deepspeed={"stage": stage, "extra": extra})
        object.__setattr__(config, "launch", dataclasses.replace(config.launch, **launch))
        object.__setattr__(config.train, "device", "cuda" if num_gpus else "cpu")
        return deepspeed_config(config)["zero_optimization"].get("overlap_comm")

    assert [overlaps(2, stage) for stage in (0, 1, 2, 3)] == [None, None, True, None]
    assert [overlaps(1, 2), overlaps(0, 2)] == [None, None]
    assert overlaps(2, 2, zero_optimization={"overlap_comm": False}) is False


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        (
            {"optim": {"name": "adamw", "paged": True}},
            "optim.paged=true: is not of optim=adamw; type optim=adamw_8bit as well",
        ),
        (
            {"optim": EIGHT, "deepspeed": {"stage": 2, "offload": "optimizer"}},
            "deepspeed.offload=optimizer: leaves no moments on the GPU to hold in 8 bits; type optim=adamw, "
            "or deepspeed.offload=none optim.paged=true",
        ),
        (
            {"optim": {"warmup_steps": 3, "warmup_ratio": 0.1}},
            "optim.warmup_ratio=0.1: says the same as optim.warmup_steps=3; type optim.warmup_steps=0 or "
            "optim.warmup_ratio=null",
        ),
        (
            {"optim": {"schedule": "linear", "floor": 0.1}},
            "optim.floor=0.1: has no effect with optim.schedule=linear; type optim.schedule=cosine or "
            "optim.schedule=wsd, or optim.floor=0",
        ),
        (
            {"optim": {"schedule": "cosine", "decay_ratio": 0.2}},
            "optim.decay_ratio=0.2: has no effect with optim.schedule=cosine; type optim.schedule=wsd",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(groups: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(**groups)
    assert str(caught.value) == line


def test_rmsprop_by_hand() -> None:
    """v <- 0.9 v + 0.1 g^2, buffer <- 0.5 buffer + g / (sqrt v + 0.01), w <- w - 0.1 buffer, g with 0.2 w of
    weight decay in it; w = 1, its own gradients 1 and -2."""
    keys = {"name": "rmsprop", "lr": 0.1, "smoothing": 0.9, "eps": 0.01, "momentum": 0.5, "weight_decay": 0.2}
    config = config_of(optim=keys).optim
    assert config.first_decay == 0.5
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = build_optimizer(config, [parameter])
    w, v, buffer = 1.0, 0.0, 0.0
    for own in (1.0, -2.0):
        parameter.grad = torch.tensor([own])
        optimizer.step()
        g = own + 0.2 * w
        v = 0.9 * v + 0.1 * g**2
        buffer = 0.5 * buffer + g / (v**0.5 + 0.01)
        w -= 0.1 * buffer
        assert parameter.item() == pytest.approx(w, rel=1e-5)


def rates(num_steps: int, **keys: Any) -> list[float]:
    """Of each step, as shares of the peak, and of one after the last."""
    config = config_of(optim={"lr": 2.0, **keys}).optim
    optimizer = build_optimizer(config, [torch.nn.Parameter(torch.ones(1))])
    schedule, made = build_schedule(config, optimizer, num_steps), []
    for _ in range(num_steps + 1):
        made.append(schedule.get_last_lr()[0] / 2)
        optimizer.step()
        schedule.step()
    return made


def test_schedules_by_hand() -> None:
    """Cosine: floor + (1 - floor)(1 + cos(pi t/n))/2. wsd of 10 steps: 0.15 of them is 2 of warm-up, 0.35 is
    4 of decay. A share of no steps is none."""
    assert rates(4, warmup_ratio=0.5) == [0, 0.5, 1, 1, 1]
    assert rates(4, schedule="linear", warmup_ratio=0.3) == [0, 0.5, 1, 0.5, 0]
    assert rates(4, schedule="cosine") == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])
    assert rates(2, schedule="cosine", floor=0.2) == pytest.approx([1, 0.6, 0.2])
    wsd = rates(10, schedule="wsd", warmup_ratio=0.15, decay_ratio=0.35, floor=0.1)
    down = [0.1 + 0.9 * (0.5 + 0.5**1.5), 0.55, 0.1 + 0.9 * (0.5 - 0.5**1.5), 0.1]
    assert wsd == pytest.approx([0.1, 0.55, 1, 1, 1, 1, 1, *down])
    assert rates(10, schedule="wsd", warmup_steps=2, decay_ratio=0.4, floor=0.1) == wsd
    assert rates(3, warmup_ratio=0.0) == rates(3) == [1, 1, 1, 1]


def test_a_decay_longer_than_the_run_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        rates(10, schedule="wsd", warmup_steps=8, decay_ratio=0.5)
    assert str(caught.value) == (
        "optim.decay_ratio=0.5: 5 steps of decay after 8 of warm-up are more than the run's 10; type "
        "optim.decay_ratio=0.2"
    )


@pytest.mark.parametrize("is_here", [False, True])
def test_8_bits_need_bitsandbytes_and_paging_a_gpu(is_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read: exit code 2, and what to type."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        rcpo.engine.optimizer.importlib.util, "find_spec",
        lambda name: (find("torch") if is_here else None) if name == "bitsandbytes" else find(name),
    )  # fmt: skip
    line = fault(config_of(optim=EIGHT | {"paged": True}))
    assert line == (
        "optim.paged=true: there is no GPU memory here to move moments out of; type optim.paged=false"
        if is_here
        else "optim=adamw_8bit: needs the bitsandbytes package; pip install 'rcpo[quantization]', or type "
        "optim=adamw"
    )


@pytest.mark.ci("8-bit AdamW", needs="bitsandbytes")
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "layout", [Layout(1, 4, 0), Layout(1, 4, 1), Layout(2, 2, 2), Layout(2, 2, 3)], ids=str
)
def test_8_bit_moments_train_save_and_resume(layout: Layout, tmp_path: Path) -> None:
    """The loss falls, the weights are AdamW's to a third of what six steps of lr 0.003 can move them by, and
    a resumed run is the same run, to the bit. With one rank at stage 1 the parameters are one vector, long
    enough for 8 bits: the checkpoint says so."""
    write_inputs(tmp_path)
    words = ("train.save_every=3", "optim.eps=1e-4")
    run, plain = (
        make_run(make_config(tmp_path, tmp_path / name, Case("dpo", "on", "llama", name), layout, *words))
        for name in ("adamw_8bit", "adamw")
    )
    train_all([run, plain], layout.ranks, 200)
    resumed = RunFolder(tmp_path / "resumed")
    shutil.copytree(run.path, resumed.path)
    shutil.rmtree(resumed.checkpoints / "step-000006")
    shutil.rmtree(resumed.final)
    do_jobs([Job(str(resumed.path), resume=True)], layout.ranks, 200)
    assert metrics(resumed) == metrics(run)
    assert metrics(run)[-1]["train/loss"] < 0.9 * metrics(run)[0]["train/loss"]
    if layout == Layout(1, 4, 1):
        file = run.checkpoints / "step-000006/engine/zero_pp_rank_0_mp_rank_00_optim_states.pt"
        kept = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
        assert {value.dtype for value in _tensors(kept)} >= {torch.uint8}
    checkpoint = run.checkpoints / "step-000006"
    if layout.stage:
        with pytest.raises(UserError, match="with optim=adamw_8bit, and DeepSpeed shares out AdamW"):
            refuse_unloadable(checkpoint, layout.ranks + 1, layout.stage, "adamw_8bit")
    refuse_unloadable(checkpoint, layout.ranks, layout.stage, "adamw_8bit")
    eight, full = final_weights(run), final_weights(plain)
    for name, weight in final_weights(resumed).items():
        assert torch.equal(weight, eight[name]), name
        assert (eight[name] - full[name]).abs().max() < 0.006
    assert any(not torch.equal(eight[name], full[name]) for name in full)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)
