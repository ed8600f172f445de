"""What a model does to head(hidden) before it calls it logits: nothing, a factor, a soft cap, or both.

Read off the model's own forward method, whose body and head are replaced for one call by stand-ins that hand
numbers through. So no list of architectures or of config keys has to be right: the same key multiplies in one
of them and divides in another. Called by `rcpo.models.policy`; that the numbers of real weights agree is
checked by `rcpo.training.rehearsal`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rcpo.common.errors import UserError

POINTS = (0.0, 1e-3, 0.5, 1.0, 3.0, 7.5, 15.0, 31.0, 64.0, 130.0)
"""Where a model's transformation is looked at, and at the same places below zero."""
FAR = 1e7
"""Beyond any cap."""
TOLERANCE = 1e-4
"""Relative; fp32 arithmetic of a tanh and two products is within 1e-6."""


class _Output:
    """What any body's output has: hidden states first, and None for whatever else is asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]


class LogitTransform(NamedTuple):
    """logits = cap tanh(scale x / cap) of x = head(hidden); scale x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """In place on fp32 `raw`."""
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.cap is not None:
            raw.div_(self.cap).tanh_().mul_(self.cap)
        return raw

    def slope(self, logits: Tensor) -> Tensor | None:
        """Of the cap at transformed `logits`, 1 - (logits / cap)^2 of their shape; None without one: 1."""
        return None if self.cap is None else 1 - (logits / self.cap).square_()


NOTHING = LogitTransform()


def body_of(model: PreTrainedModel) -> nn.Module:
    """The module between token ids and the last hidden states. Raises UserError where there is none."""
    for body in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if isinstance(body, nn.Module) and body is not model:
            return body
    raise UserError(
        f"model.path: {type(model).__name__} has no body apart from its output head; give another model"
    )


def logit_transform(model: PreTrainedModel, head: nn.Module) -> LogitTransform:
    """The transformation of this model; `NOTHING` where its forward method cannot be asked.

    Raises UserError where it can, and what it does is neither a factor nor a soft cap.
    """
    seen = _asked(model, head)
    if seen is None:
        return NOTHING
    points, values, far = seen
    small = POINTS.index(1e-3)
    scale = float(values[small] / points[small])
    capped = abs(far) < FAR * abs(scale) * 0.5
    found = LogitTransform(_rounded(scale), _rounded(far) if capped else None)
    expected = found(points.clone())
    if not torch.allclose(expected, values, rtol=TOLERANCE, atol=TOLERANCE):
        worst = int((expected - values).abs().argmax())
        raise UserError(
            f"model.path: {type(model).__name__} makes {values[worst]:.6g} of the number {points[worst]:.6g} "
            "of its output head, which is neither a factor nor a soft cap; give another model"
        )
    return found


def _rounded(value: float) -> float:
    """Without the noise of fp32 arithmetic: factors and caps are short decimal numbers, or ratios."""
    return float(f"{value:.6g}")


def _asked(model: PreTrainedModel, head: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """(points, what the model makes of them, what it makes of FAR), or None."""
    points = torch.tensor([*POINTS, *(-point for point in POINTS)])
    width = int(getattr(head, "in_features", 0))
    hidden = torch.zeros(1, 1, max(width, len(points) + 1))
    hidden[0, 0, : len(points)] = points
    hidden[0, 0, len(points)] = FAR
    hidden = hidden[:, :, :width] if width > len(points) else hidden
    try:
        with torch.no_grad(), _stand_ins(model, head, hidden):
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    # A forward method may want anything of its body; the rehearsal compares real numbers in any case.
    except Exception:
        return None
    if logits.numel() <= len(points) or logits.is_meta:
        return None
    found = logits.flatten().float()
    return points, found[: len(points)], float(found[len(points)])


@contextlib.contextmanager
def _stand_ins(model: PreTrainedModel, head: nn.Module, hidden: Tensor) -> Iterator[None]:
    """While open, the body gives `hidden` and the head hands its input through."""
    bodies = {id(each): each for each in (model.base_model, body_of(model)) if each is not model}
    output = _Output(hidden)
    was_training = model.training
    model.eval()
    try:
        for body in bodies.values():
            body.forward = lambda *args, **kwargs: output
        head.forward = lambda numbers: numbers
        yield
    finally:
        for module in (*bodies.values(), head):
            vars(module).pop("forward", None)
        model.train(was_training)
