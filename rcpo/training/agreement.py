"""What must agree before a number is trusted, on one short pair before anything long starts.

Two passes in training mode, and one in evaluation: a model that draws random numbers has no z. rcpo's head
against the model's own logits: an architecture that does more between its last hidden states and its logits
than rcpo knows of would be trained on other numbers than it will speak with. A row beside longer rows, or
joined with others, against the row alone: what follows a token must not reach it. And every adapter must be
run. Called by `rcpo.training.loop` on every rank; changes nothing.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rcpo.common.errors import UserError, first_line
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import PairBatch, collate
from rcpo.data.inputs import Inputs
from rcpo.data.joint import collate_joint
from rcpo.data.pairs import TokenizedPair, TokenizedSide
from rcpo.engine.engine import Engine
from rcpo.models.adapters import lora_layers
from rcpo.ranks.distributed import gather

NUM_TOKENS = 48
"""Of each side, at most: the model's own logits are whole ones."""
SHORTENED_BY = 4
"""Tokens that a shortened pair leaves out at either end."""
TOLERANCE_NATS = {"float32": 0.01, "bfloat16": 0.5}
"""Largest difference of a token's log-probability that rounding explains; bf16 logits near 20 are 0.125
apart. That of a sum over n tokens is sqrt(n) times as much."""


def check_agreement(config: ResolvedConfig, inputs: Inputs, engine: Engine) -> None:
    """Raise UserError, on every rank, where two training passes differ, rcpo's head is not the model's, a row
    depends on what it stands beside, or an adapter is not run. Collective."""
    pair = _short_pair(inputs)
    batch = collate([pair], inputs.pad_id).to(engine.device)
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        if config.model.lora.dropout == 0:  # what a user asks for is random
            _check_passes(config, engine, batch)
        _check_head(config, engine, batch)
        _check_rows(config, engine, [_shortened(pair), pair], inputs.pad_id)
        if config.model.lora.rank is not None:
            _check_adapters_run(engine, batch)


def _short_pair(inputs: Inputs) -> TokenizedPair:
    """The pair with the fewest tokens, cut to NUM_TOKENS a side; one with an image where there are any."""
    widths, pictures = inputs.train.widths(), inputs.train.pictures
    seen = [] if pictures is None else [idx for idx, each in enumerate(pictures) if each is not None]
    places = seen or [idx for idx, width in enumerate(widths) if width]
    pair = inputs.train[min(places, key=widths.__getitem__)]

    def cut(side: TokenizedSide) -> TokenizedSide:
        if pair.pictures is not None:  # its prompt has the tokens of images, and stays whole
            return TokenizedSide(side.input_ids[: side.num_prompt + NUM_TOKENS // 2], side.num_prompt)
        num_prompt = min(side.num_prompt, NUM_TOKENS // 2)
        first = side.num_prompt - num_prompt
        return TokenizedSide(side.input_ids[first : first + NUM_TOKENS], num_prompt)

    return TokenizedPair(cut(pair.sides[0]), cut(pair.sides[-1]), pair.row, pictures=pair.pictures)


def _check_passes(config: ResolvedConfig, engine: Engine, batch: PairBatch) -> None:
    first, second = (engine.logprobs_as_trained(batch) for _ in range(2))
    largest, scale = _largest(first - second), batch.lengths.sqrt()
    if _largest((first - second) / scale) <= TOLERANCE_NATS[config.model.dtype] / 100:
        evaluated = engine.logprobs_without_grad(batch)
        if _largest((first - evaluated) / scale) > TOLERANCE_NATS[config.model.dtype]:
            raise UserError(
                f"model.path={config.model.path}: {type(engine.policy.model).__name__} is another function "
                f"in a training pass than in an evaluation: a pair's log-probability is {first[0]:.4f} and "
                f"{evaluated[0]:.4f}; give another model"
            )
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


def _shortened(pair: TokenizedPair) -> TokenizedPair:
    """The pair with fewer tokens at both ends, so that it is padded beside the pair; a prompt and a response
    keep one each."""

    def shorter(side: TokenizedSide) -> TokenizedSide:
        num_front = 0 if pair.pictures is not None else min(SHORTENED_BY, side.num_prompt - 1)
        num_back = min(SHORTENED_BY, side.num_tokens - side.num_prompt - 1)
        return TokenizedSide(
            side.input_ids[num_front : side.num_tokens - num_back], side.num_prompt - num_front
        )

    return TokenizedPair(shorter(pair.chosen), shorter(pair.rejected), pair.row, pictures=pair.pictures)


def _check_rows(config: ResolvedConfig, engine: Engine, pairs: list[TokenizedPair], pad_id: int) -> None:
    """Each side on rows without padding, against all sides on one grid, and against the joint layout."""

    def token_logps(batch: PairBatch) -> Tensor:
        return engine.logprobs_without_grad(batch.to(engine.device), tokens=True)

    def alone(side: TokenizedSide) -> Tensor:
        batch = collate([TokenizedPair(side, side, 0, pictures=pairs[0].pictures)], pad_id)
        return token_logps(batch)[: batch.num_chosen_tokens]

    sides = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    expected = torch.cat([alone(side) for side in sides])
    name = type(engine.policy.model).__name__
    _compare(
        config, expected, lambda: token_logps(collate(pairs, pad_id)),
        f"model.path={config.model.path}: {name} lets a token depend on what follows it or on its row's "
        "neighbours", "give a model that continues text",
    )  # fmt: skip
    layouts = {"share_prefix": (True, False), "packing": (config.train.share_prefix, True)}
    for key, (share_prefix, packing) in layouts.items():
        if getattr(config.train, key):
            joint = collate_joint(pairs, pad_id, share_prefix, packing)
            _compare(
                config, expected, functools.partial(token_logps, joint),
                f"train.{key}=true: {name} cannot have sequences side by side on a row",
                f"type train.{key}=false",
            )  # fmt: skip


def _compare(
    config: ResolvedConfig, expected: Tensor, compute: Callable[[], Tensor], fault: str, advice: str
) -> None:
    """By the mean difference: in bf16 a token may go to another expert beside other rows."""
    try:
        found = compute()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a mask or positions it cannot take
        raise UserError(f"{fault}: {first_line(error)}; {advice}") from error
    if _largest((found - expected).abs().mean()[None]) <= TOLERANCE_NATS[config.model.dtype]:
        return
    worst = int((found - expected).abs().argmax())
    raise UserError(
        f"{fault}: a token's log-probability is {expected[worst]:.4f} on a row of its own and "
        f"{found[worst]:.4f} there; {advice}"
    )


def _check_adapters_run(engine: Engine, batch: PairBatch) -> None:
    """A layer whose weight is read without a call goes around its adapter, which then does nothing."""
    has_run: set[str] = set()
    layers = lora_layers(engine.policy.model)
    handles = [
        layer.register_forward_hook(lambda *_, name=name: has_run.add(name.rpartition(".")[2]))
        for name, layer in layers
    ]
    try:
        engine.logprobs_without_grad(batch)
    finally:
        for handle in handles:
            handle.remove()
    # By last names: of a mixture's experts a short pair may meet a few alone.
    skipped = sorted({name.rpartition(".")[2] for name, _ in layers} - has_run)
    if skipped:
        kind = type(engine.policy.model).__name__
        raise UserError(
            f"model.lora.targets: {kind} reads the weight of {skipped[0]} without calling it, so an adapter "
            "there does nothing; type model.lora.targets=[NAME,...] without it"
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
