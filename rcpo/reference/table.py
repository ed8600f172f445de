"""Reference log-probs by pair index: what a micro-batch is given. Does not compute them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcpo.common.errors import UserError
from rcpo.common.files import replacing
from rcpo.data.batch import PairBatch
from rcpo.data.mismatched import Mismatch
from rcpo.data.pairs import SideLogProbs


class ReferenceRows(NamedTuple):
    """What a micro-batch gets of the reference."""

    ref_w: Tensor
    """(B,) fp32, and likewise `ref_l`."""
    ref_l: Tensor
    ref_token_logps: Tensor | None
    """(N,) fp32, all chosen tokens and then all rejected ones, where the objective weighs tokens."""


class Start(NamedTuple):
    """Held-out z under the policy's initial weights: what displacement is measured against."""

    z_w: Tensor
    """(n,) fp32 on the CPU, and likewise `z_l`."""
    z_l: Tensor
    probe: SideLogProbs
    """Of the first pairs, which a calibrator's probe takes: by a pass of their own where the batches that
    pairs go through in change their rounding."""
    reference: SideLogProbs | None
    """The same pairs under the reference: the start itself, but where the reference has weights of its own.
    None where it has, and the run was started by an rcpo that did not keep them."""
    noise: float | None = None
    """Root mean square, over pairs and sides, of what rounding makes of r; None where z is fp32."""


class Reference(Protocol):
    """Where reference log-probs of training pairs come from: `ReferenceTable`, or
    `rcpo.reference.maker.LiveReference`."""

    num_bytes: int
    """Memory of a rank that it holds on the device."""

    def rows(self, indices: Sequence[int], batch: PairBatch, apart: bool = False) -> ReferenceRows:
        """Of these training pairs, which `batch` has laid out; `apart` where the policy takes its sides one
        after the other. Collective at ZeRO 3."""

    def mismatched_rows(self, which: Sequence[Mismatch], batch: PairBatch) -> SideLogProbs:
        """Of these mismatched pairs, which `batch` has laid out. Collective at ZeRO 3."""


TOKENS = "tokens."
MISMATCHED = "mismatched"
PROBE = ("probe_w", "probe_l")
REFERENCE = ("held_out_ref_w", "held_out_ref_l")
NOISE = "noise"


class ReferenceTable:
    """Reference log-probs by pair index, for the training pairs a run visits and for all held-out pairs; by
    both indices, for the mismatched pairs that it visits.

    Pairs the run never visits are nan, and looking one up is an error. `held_out` is under the policy's
    initial weights, whatever the reference is: displacement is measured against it. `train` is empty where
    the reference is live. `fingerprint` is of the weights of `train`.
    """

    num_bytes = 0

    def __init__(
        self,
        train: SideLogProbs,
        held_out: SideLogProbs,
        tokens: dict[int, Tensor] | None = None,
        fingerprint: str = "",
        probe: SideLogProbs | None = None,
        noise: float | None = None,
    ) -> None:
        self.train, self.held_out, self.fingerprint = train, held_out, fingerprint
        self.probe, self.noise = probe, noise
        """As `Start` has them; no probe: the first held-out pairs."""
        self.tokens = tokens or {}
        """By training pair the log-probs of its chosen and then its rejected tokens; empty but for objectives
        that weigh tokens."""
        self.mismatched: dict[Mismatch, tuple[float, float]] = {}
        """ref_w and ref_l of mismatched pairs; empty but for objectives that need them."""
        self.held_out_reference: SideLogProbs | None = None
        """The held-out pairs under a reference with weights of its own."""

    def has(self, indices: Sequence[int], tokens: bool, mismatches: Sequence[Mismatch] = ()) -> bool:
        """Whether all these training pairs are in the table, with `tokens` token by token too, and all these
        mismatched ones."""
        rows = list(indices)
        if not all(which in self.mismatched for which in mismatches):
            return False
        if tokens and not all(idx in self.tokens for idx in rows):
            return False
        return not bool(torch.isnan(self.train.z_w[rows]).any() or torch.isnan(self.train.z_l[rows]).any())

    def start(self, num_probed: int, own_weights: bool = False) -> Start:
        """What displacement is measured against; `num_probed` pairs are of the probe. `own_weights`: whether
        the reference is another model than the initial policy."""
        z_w, z_l = self.held_out
        probe = self.probe or SideLogProbs(z_w[:num_probed], z_l[:num_probed])
        reference = self.held_out_reference if own_weights else self.held_out
        return Start(z_w, z_l, probe, reference, self.noise)

    def rows(self, indices: Sequence[int], batch: PairBatch, apart: bool = False) -> ReferenceRows:
        """As `Reference` says; on the CPU."""
        ref_w, ref_l = self.train_rows(indices)
        num_chosen = batch.lengths[: len(indices)].tolist()
        return ReferenceRows(ref_w, ref_l, self.token_rows(indices, num_chosen))

    def mismatched_rows(self, which: Sequence[Mismatch], batch: PairBatch) -> SideLogProbs:
        """As `Reference` says; on the CPU."""
        values = torch.tensor([self.mismatched[each] for each in which], dtype=torch.float32)
        return SideLogProbs(values[:, 0], values[:, 1])

    def train_rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(ref_w, ref_l) of training pairs, each (B,) fp32."""
        rows = list(indices)
        ref_w, ref_l = self.train.z_w[rows], self.train.z_l[rows]
        if torch.isnan(ref_w).any() or torch.isnan(ref_l).any():
            raise RuntimeError(
                f"pairs {rows} have no reference log-probs; the run's plan and its table disagree"
            )
        return ref_w, ref_l

    def token_rows(self, indices: Sequence[int], num_chosen: Sequence[int]) -> Tensor | None:
        """(N,) fp32, all chosen tokens of these pairs and then all rejected ones; None where the table has no
        tokens. `num_chosen` is |y_w| of each pair."""
        if not self.tokens:
            return None
        parts = [self.tokens[idx] for idx in indices]
        both = list(zip(parts, num_chosen, strict=True))
        return torch.cat([part[:num] for part, num in both] + [part[num:] for part, num in both])

    def save(self, path: Path) -> None:
        tensors = {
            "train_w": self.train.z_w, "train_l": self.train.z_l,
            "held_out_w": self.held_out.z_w, "held_out_l": self.held_out.z_l,
        } | {f"{TOKENS}{idx}": token_logps for idx, token_logps in self.tokens.items()}  # fmt: skip
        if self.mismatched:
            tensors[f"{MISMATCHED}_of"] = torch.tensor(list(self.mismatched))
            tensors[MISMATCHED] = torch.tensor(list(self.mismatched.values()), dtype=torch.float32)
        if self.probe is not None:
            tensors |= dict(zip(PROBE, self.probe, strict=True))
        if self.held_out_reference is not None:
            tensors |= dict(zip(REFERENCE, self.held_out_reference, strict=True))
        if self.noise is not None:
            tensors[NOISE] = torch.tensor(self.noise)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replacing(path) as beside:
            save_file(contiguous, beside, metadata={"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: Path) -> "ReferenceTable":
        """What `save` wrote; UserError when it is missing or damaged."""
        try:
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                fingerprint = (file.metadata() or {}).get("fingerprint", "")
            table = cls(
                SideLogProbs(tensors["train_w"], tensors["train_l"]),
                SideLogProbs(tensors["held_out_w"], tensors["held_out_l"]),
                {
                    int(name.removeprefix(TOKENS)): token_logps
                    for name, token_logps in tensors.items()
                    if name.startswith(TOKENS)
                },
                fingerprint,
                SideLogProbs(*(tensors[name] for name in PROBE)) if PROBE[0] in tensors else None,
                float(tensors[NOISE]) if NOISE in tensors else None,
            )
            if REFERENCE[0] in tensors:
                table.held_out_reference = SideLogProbs(*(tensors[name] for name in REFERENCE))
            if MISMATCHED in tensors:
                which = (Mismatch(*both) for both in tensors[f"{MISMATCHED}_of"].tolist())
                values = (tuple(both) for both in tensors[MISMATCHED].tolist())
                table.mismatched = dict(zip(which, values, strict=True))
            return table
        except (OSError, SafetensorError, KeyError):
            raise UserError(
                f"{path}: is missing or damaged, and displacement is measured against it; remove the run's "
                "checkpoints to start it again from its first step"
            ) from None
