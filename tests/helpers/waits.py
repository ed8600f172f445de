"""What makes a host wait for its device: numbers read from it, and copies that are not queued behind the
rest."""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_consecutive.default,
}  # fmt: skip
"""A number, or a shape that depends on numbers."""


class Waits(TorchDispatchMode):
    """Counts by the file that asks: reads, and blocking copies between devices. `counted` opens it."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in READS:
            self.readers[_asking()] += 1
        if function is aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            self.copies[_asking()] += not kwargs.get("non_blocking", False)
        if function is aten.copy_.default and args[0].device != args[1].device:
            self.copies[_asking()] += not (kwargs.get("non_blocking", False) or args[2:] == (True,))
        return function(*args, **kwargs)


class _Constants(TorchFunctionMode):
    """Tensors made on a device out of Python numbers, which are copied there by a blocking copy that the
    dispatcher does not see."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        if function is Tensor.new_tensor:
            device = args[0].device
        elif function in (Tensor.__getitem__, Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            device = args[0].device if any(isinstance(place, list) for place in places) else device
        elif function not in (torch.tensor, torch.as_tensor):
            device = torch.device("cpu")
        if device.type != "cpu":
            self._waits.copies[_asking()] += 1
        return function(*args, **kwargs)


@contextlib.contextmanager
def counted() -> Iterator[Waits]:
    """While open, what makes the host wait is counted."""
    waits = Waits()
    with _Constants(waits), waits:
        yield waits


def _asking() -> str:
    """The newest file of the stack that is not torch's machinery: its path below site-packages or below the
    repository."""
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename
        if "/torch/" not in path.replace("/torch/optim/", "/") and not path.endswith("helpers/waits.py"):
            return path.rpartition("site-packages/")[2].rpartition("/rcpo/")[2]
    return "?"
