"""What must agree before a number is trusted, on one short pair before anything long starts.

Two passes in training mode: a model that draws random numbers there has no z. And rcpo's head against the
model's own logits: an architecture that does more between its last hidden states and its logits than rcpo
knows of would be trained on other numbers than it will speak with. Called by `rcpo.training.loop` on every
rank; changes nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rcpo.common.errors import UserError
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch, collate
from rcpo.data.inputs import Inputs
from rcpo.data.pairs import TokenizedPair, TokenizedSide
from rcpo.models.engine import Engine
from rcpo.ranks.distributed import gather

NUM_TOKENS = 48
"""Of each side, at most: the model's own logits are whole ones."""
TOLERANCE_NATS = {"float32": 0.01, "bfloat16": 0.5}
"""Largest difference of a token's log-probability that rounding explains; bf16 logits near 20 are 0.125
apart."""


def check_agreement(config: ResolvedConfig, inputs: Inputs, engine: Engine) -> None:
    """Raise UserError, on every rank, where two training passes differ or rcpo's head is not the model's.
    Collective."""
    batch = collate([_short_pair(inputs)], inputs.pad_id).to(engine.device)
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        if config.model.lora.dropout == 0:  # what a user asks for is random
            _check_passes(config, engine, batch)
        _check_head(config, engine, batch)


def _short_pair(inputs: Inputs) -> TokenizedPair:
    """The pair with the fewest tokens, cut to NUM_TOKENS a side."""
    widths = inputs.train.widths()
    pair = inputs.train[min(range(len(widths)), key=widths.__getitem__)]

    def cut(side: TokenizedSide) -> TokenizedSide:
        num_prompt = min(side.num_prompt, NUM_TOKENS // 2)
        first = side.num_prompt - num_prompt
        return TokenizedSide(side.input_ids[first : first + NUM_TOKENS], num_prompt)

    return TokenizedPair(cut(pair.chosen), cut(pair.rejected), pair.row)


def _check_passes(config: ResolvedConfig, engine: Engine, batch: PairBatch) -> None:
    first, second = (engine.logprobs_as_trained(batch) for _ in range(2))
    largest = _largest(first - second)
    if largest <= TOLERANCE_NATS[config.model.dtype] / 100:
        return
    name = first_random_module(engine.policy.model, lambda: engine.logprobs_as_trained(batch))
    raise UserError(
        f"model.path={config.model.path}: two training passes of one pair differ by {largest:.3g} nats, "
        f"because {name} draws random numbers, so that a log-probability has no value; give another model"
    )


def _check_head(config: ResolvedConfig, engine: Engine, batch: PairBatch) -> None:
    own = engine.logprobs_without_grad(batch, tokens=True, own_logits=True)
    ours = engine.logprobs_without_grad(batch, tokens=True)
    largest = _largest(own - ours)
    if largest <= TOLERANCE_NATS[config.model.dtype]:
        return
    worst = int((own - ours).abs().argmax())
    raise UserError(
        f"model.path={config.model.path}: {type(engine.policy.model).__name__} does more between its last "
        "hidden states and its logits than rcpo knows of: a token's log-probability is "
        f"{own[worst]:.4f} by the model and {ours[worst]:.4f} by rcpo's head; give another model"
    )


def _largest(difference: Tensor) -> float:
    """On any rank; nan is larger than all."""
    values = gather(float(difference.abs().max()))
    return float("inf") if any(value != value for value in values) else max(values)


def first_random_module(model: nn.Module, run: Callable[[], object]) -> str:
    """Name and class of the module that is the first to give two outputs for one input, by its own doing: the
    innermost one."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor):
                outputs.setdefault(name, []).append(tensor.detach().to("cpu", torch.float32, copy=True))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        run(), run()
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in outputs.items():  # in the order of being done: the inner ones first
        if len(seen) == 2 and not torch.equal(seen[0], seen[1]):
            return f"{name} ({type(model.get_submodule(name)).__name__})"
    return "it"
