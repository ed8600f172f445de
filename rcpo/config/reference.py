"""The section `reference`: what displacement and the loss are measured against. Part of
`rcpo.config.schema`."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rcpo.common.conf import IN_CONF, defaults_in
from rcpo.config.types import STRICT, NonNegative, Positive, Text


@dataclass(frozen=True, config=STRICT)
@defaults_in("reference/cached")
class ReferenceConfig:
    name: Literal["cached", "live"] = IN_CONF
    """cached: reference log-probs are computed before the first step and kept for all runs of the same
    weights. live: a frozen model stays in memory and computes them batch by batch; no cache is read or
    written."""
    path: Text | None = IN_CONF
    """Weights of the reference: a folder or a hub id with the same tokenizer as model.path; null: the
    initial policy. Training displacement is then measured against them, eval/displacement still against
    step 0 of the policy. Objectives that need no reference do not read it."""
    revision: Text | None = IN_CONF
    """Branch, tag or commit of a hub id in reference.path, as model.revision."""
    pairs_per_device: Positive | None = IN_CONF
    """Pairs of one forward pass of the reference on a rank, to rounding without effect; null: four
    micro-batches where cached, one where live, which takes at most one."""
    sync_every: NonNegative = IN_CONF
    """Optimizer steps after which the reference that the loss reads takes in the policy's weights (TR-DPO,
    arXiv 2404.09656), as a frozen model in memory; 0: never. Displacement is measured against the one of the
    start."""
    sync_mix: Annotated[float, Field(gt=0, le=1)] = IN_CONF
    """The policy's share in what the reference's weights then become; 1: a copy of the policy."""
    sync_how: Literal["mix", "bema"] = IN_CONF
    """mix: by sync_mix. bema: the reference becomes a bias-corrected average of the policy
    (`rcpo.reference.bema`; arXiv 2508.00180, with TRL's defaults)."""
    bema_power: Annotated[float, Field(ge=0)] = IN_CONF
    """The average takes in (bema_lag + step)^-bema_power of the policy; 0: a copy of the policy."""
    bema_bias: Annotated[float, Field(ge=0)] = IN_CONF
    """(bema_lag + step)^-bema_bias of the policy's way from the start is added to the average; large: no
    correction."""
    bema_lag: Annotated[float, Field(ge=1)] = IN_CONF
    """Steps that the average is older than the run; at least 1."""
