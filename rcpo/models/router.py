"""The load-balancing loss of mixtures of experts, over a whole global batch.

Owns its formula and what of it a pass gives. Does not own the order of passes: `rcpo.training.beforehand`
counts first, over the global batch, and the step trains with what was counted, so that the loss does not
depend on how the batch is split. Called by `rcpo.models.policy`.

Shape legend: E experts, R rows of T tokens, S = routed tokens times layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.data.batch import PADDING, PairBatch


def real_tokens(batch: PairBatch) -> Tensor:
    """(R, T) bool: what is no padding."""
    if batch.segments is not None:
        return batch.segments.pair != PADDING
    num_rows, width = batch.input_ids.shape
    last = (batch.lengths.cumsum(0) - 1).clamp(min=0)
    before_last = batch.token_positions[last]  # the last token is predicted there
    used = torch.zeros(num_rows, dtype=torch.int64, device=before_last.device)
    used = used.scatter_reduce(0, before_last // width, before_last % width + 2, "amax")
    return torch.arange(width, device=used.device) < used[:, None]


def expert_sums(router_logits: Sequence[Tensor], batch: PairBatch, top_k: int) -> Tensor:
    """(2E + 1,) fp64, detached, over the real tokens of all layers: how many went to each expert, the sum of
    each expert's probability, and S."""
    real = real_tokens(batch).flatten()
    total = None
    for logits in router_logits:
        p = logits.detach().flatten(0, -2)[real].double().softmax(-1)
        chosen = torch.zeros_like(p).scatter_(1, p.topk(top_k, dim=-1).indices, 1.0)
        sums = torch.cat([chosen.sum(0), p.sum(0), p.new_full((1,), len(p))])
        total = sums if total is None else total + sums
    assert total is not None
    return total


def expert_costs(sums: Tensor) -> tuple[float, Tensor]:
    """From `expert_sums` of a global batch: the loss E sum_e f_e P_e, f_e the share of tokens that expert e
    got (k of them in all) and P_e its mean probability; and its derivative by each summed probability, (E,)
    fp32. f has no gradient. Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6."""
    num_experts = (len(sums) - 1) // 2
    num_routed = sums[-1]
    shares, probabilities = sums[:num_experts] / num_routed, sums[num_experts:-1] / num_routed
    loss = num_experts * float(shares @ probabilities)
    return loss, (num_experts * shares / num_routed).float()


def cost_of(router_logits: Sequence[Tensor], batch: PairBatch, costs: Tensor) -> Tensor:
    """sum_e cost_e (sum of expert e's probability over the batch's real tokens and all layers), attached."""
    real = real_tokens(batch).flatten()[:, None]
    total = costs.new_zeros(())
    for logits in router_logits:
        p = logits.flatten(0, -2).float().softmax(-1)
        total = total + ((p * real).sum(0) * costs).sum()
    return total


def check_router(model: PreTrainedModel, router_loss: float) -> None:
    """Raise UserError where a model has no router whose loss could be taken."""
    config = model.config.get_text_config()
    if router_loss and not (
        hasattr(config, "output_router_logits") and getattr(config, "num_experts_per_tok", None)
    ):
        raise UserError(
            f"model.router_loss={router_loss}: {type(model).__name__} has no router of experts, or does not "
            "tell what it did; type model.router_loss=0"
        )
