"""The optimizer that DeepSpeed steps: torch's AdamW, SGD or RMSprop, or bitsandbytes' AdamW with moments in 8
bits.

`rcpo.engine.engine` hands the optimizer over to DeepSpeed."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig, ResolvedOptim


def check_optimizer(config: ResolvedConfig) -> None:
    """Raise UserError where the optimizer cannot work here."""
    if config.optim.name != "adamw_8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optim=adamw_8bit: needs the bitsandbytes package; pip install 'rcpo[quantization]', or type "
            "optim=adamw"
        )
    if config.optim.paged and config.train.device == "cpu":
        raise UserError(
            "optim.paged=true: there is no GPU memory here to move moments out of; type optim.paged=false"
        )


def _load_muon_plainly() -> None:
    """Load DeepSpeed's Muon, which `initialize` looks for among optimizers of any kind, without compiling its
    functions: the decorator alone loads torch's compiler, 0.8 s of CPU, and no run steps with Muon. Another
    DeepSpeed may not have it."""
    from deepspeed.runtime import compiler

    compile_ = compiler.compile
    compiler.compile = lambda *args, **kwargs: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_


def build_optimizer(
    config: ResolvedOptim, parameters: list[torch.nn.Parameter], is_fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters; `is_fused`: AdamW updates them in one kernel, which needs
    parameters and moments on a GPU, and rounds otherwise than without."""
    _load_muon_plainly()
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    if config.name == "rmsprop":
        return torch.optim.RMSprop(
            parameters, lr=config.lr, alpha=config.smoothing, eps=config.eps, momentum=config.momentum,
            weight_decay=config.weight_decay,
        )  # fmt: skip
    beta1, beta2 = config.betas
    if config.name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # seconds, and mostly not needed

        optimizer: torch.optim.Optimizer = AdamW8bit(
            parameters, lr=config.lr, betas=(beta1, beta2), eps=config.eps,
            weight_decay=config.weight_decay, is_paged=config.paged,
        )  # fmt: skip
        return optimizer
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(beta1, beta2), eps=config.eps,
        weight_decay=config.weight_decay, fused=True if is_fused else None,
    )  # fmt: skip


def can_be_fused(config: ResolvedConfig) -> bool:
    """Whether weights and moments are on a GPU."""
    return config.train.device == "cuda" and config.deepspeed.offload == "none"


def make_moments(optimizer: torch.optim.Optimizer, stepped: list[torch.Tensor] | None = None) -> None:
    """AdamW's moments of its parameters, or of `stepped`, as its first step would make them: zeros. Other
    optimizers make theirs in their first step."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        on_device = group["fused"] or group["capturable"]
        for each in group["params"] if stepped is None else stepped:
            if not (state := optimizer.state[each]):
                place = each.device if on_device else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=place)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(each) for _ in range(2))


@contextlib.contextmanager
def held_still(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While open, the optimizer's steps do nothing."""
    update = optimizer.step
    optimizer.step = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        yield
    finally:
        optimizer.step = update  # type: ignore[method-assign]
