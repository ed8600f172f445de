"""Score vectors of the two sides in somebody else's loop: from the graph that z hangs on, by autograd.

`HeadScoreVectors` watches the module that makes the logits and needs no backward pass through the body, with
tied embeddings neither; `ParameterScoreVectors` takes any parameters that are whole on every rank. Both add
up sums over micro-batches and are read once a step. Called by `rcpo.library.calibrator`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rcpo.common.errors import UserError
from rcpo.method.scores import CHOSEN, REJECTED

# N token positions, V vocabulary, H hidden.


class ScoreVectors(Protocol):
    """Where the score vectors of a step are added up."""

    def watch(self, is_due: bool) -> None:
        """Whether the forward passes that follow are of a step that is measured."""

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add the gradients of two scalars, one a side, of a micro-batch; the graph stays."""

    def take(self) -> tuple[Tensor, Tensor]:
        """Both sums as flat fp32 vectors, and begin anew."""


class _Sums:
    """The two sides' sums, part by part."""

    def __init__(self) -> None:
        self._parts: dict[int, list[Tensor]] = {}

    def _add(self, side: int, parts: Sequence[Tensor]) -> None:
        if side in self._parts:
            for total, part in zip(self._parts[side], parts, strict=True):
                total += part
        else:
            self._parts[side] = [part.clone() for part in parts]

    def take(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = (
            torch.cat([part.flatten() for part in self._parts[side]]) for side in (CHOSEN, REJECTED)
        )
        self._parts = {}
        return chosen, rejected


class HeadScoreVectors(_Sums):
    """dz/dW = sum over positions of e_t h_t^T, from the head's inputs h (N, H) and z's gradient by the logits
    e (N, V): of the output projection alone, its bias included."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._has_bias = getattr(head, "bias", None) is not None
        self._is_due = False
        self._calls: list[tuple[Tensor, Tensor]] = []
        head.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], logits: Any) -> None:
        if self._is_due and isinstance(logits, Tensor) and logits.requires_grad:
            self._calls.append((inputs[0].detach(), logits))

    def watch(self, is_due: bool) -> None:
        self._is_due = is_due
        self._calls = []

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        if not self._calls:
            raise UserError(
                "calibrator.surrogate: head was not called since the last micro-batch; give the module that "
                "makes the logits, model.get_output_embeddings(), and make z after the last update()"
            )
        for side, z in ((CHOSEN, chosen), (REJECTED, rejected)):
            self._add(side, self._gradient(z))
        self._calls = []

    def _gradient(self, z: Tensor) -> list[Tensor]:
        logits = [made for _, made in self._calls]
        errors = torch.autograd.grad(z, logits, retain_graph=True, allow_unused=True)
        weight, bias = None, None
        for (hidden, _), error in zip(self._calls, errors, strict=True):
            if error is None:
                continue
            rows = error.flatten(0, -2)
            used = rows.any(dim=1)  # z reads the response's positions alone
            rows, states = rows[used].float(), hidden.flatten(0, -2)[used].float()
            product = rows.T @ states
            weight = product if weight is None else weight + product
            bias = rows.sum(0) if bias is None else bias + rows.sum(0)
        if weight is None or bias is None:
            raise UserError(
                "calibrator.surrogate: z does not come from the logits of head; give the module that makes "
                "them, or parameters=... in its place"
            )
        return [weight, bias] if self._has_bias else [weight]


class ParameterScoreVectors(_Sums):
    """The gradients by any parameters, through the whole graph; a backward pass a side."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self._parameters:
            raise UserError("parameters: hold none that trains; give model.parameters(), or some of them")

    def watch(self, is_due: bool) -> None:
        pass

    def add(self, chosen: Tensor, rejected: Tensor) -> None:
        for side, z in ((CHOSEN, chosen), (REJECTED, rejected)):
            gradients = torch.autograd.grad(
                z, self._parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            self._add(side, [gradient.float() for gradient in gradients])
