"""The policy: a causal language model read as a function from pairs to summed log-probabilities, without full
logits.

Does not own loading (`rcpo.models.load`) or training: `rcpo.engine.engine` wraps it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.data.batch import PairBatch
from rcpo.models.attention import attention_inputs
from rcpo.models.logit_transform import body_of, logit_transform
from rcpo.models.logprobs import TokenLogProbHead, importance_weighted, score_shares, sum_per_side
from rcpo.models.router import cost_of, expert_sums
from rcpo.models.vision import hidden_with_images, needs_tower, own_inputs


class Read(NamedTuple):
    """What a pass gives of the n sides of a batch, (n,) fp32 each."""

    z: Tensor
    """What the objective reads: log-probs of tokens times what they count, summed; attached to the graph."""
    sums: Tensor
    """The same with all tokens alike, detached; `z` itself where they are."""
    log_weights: Tensor | None
    """Mean over the response's tokens of log p - log sum_v p_v^2, detached, where the batch asks for it: how
    likely the response is, beside one that the model writes itself (arXiv 2406.11827)."""
    router: Tensor | None = None
    """() what the batch's experts cost, attached, where it says so."""


def read(made: Tensor, batch: PairBatch) -> Read:
    """The parts of what a policy has made of `batch`."""
    z, *rest = made.view(-1, len(batch.lengths))
    sums = z if batch.token_weights is None else rest.pop(0)
    log_weights = rest.pop(0) if batch.gives_log_weights else None
    return Read(z, sums, log_weights, None if batch.expert_costs is None else rest.pop(0)[0])


class Policy(nn.Module):
    """A causal language model and its log-prob head: `policy(batch)` is z, summed log-probs (2B,) fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        projection = _output_projection(model)
        self.head = TokenLogProbHead(projection, logit_transform(model, projection))
        self._body = [body_of(model)]  # in a list: it belongs to `model`

    @property
    def body(self) -> nn.Module:
        """From token ids to last hidden states."""
        return self._body[0]

    def forward(
        self, batch: PairBatch, tokens: bool = False, own_logits: bool = False, experts: bool = False
    ) -> Tensor:
        """z (2B,) fp32: 0..B-1 chosen, B..2B-1 rejected; with `tokens` the token log-probs (N,), with
        `own_logits` by the model's own forward method, logits and all, with `experts` the sums over the
        router's choices (`rcpo.models.router`). Where the batch has the reference's,
        z is weighted by importance. Where the batch asks for more than z, that stands behind it (`read`).

        Rows are padded on the right, so causal attention keeps padding out of every real position without a
        mask; a joint layout needs one.
        """
        if own_logits:
            return self._by_own_logits(batch)
        layout: dict[str, Any] = attention_inputs(self.model, batch)
        if batch.pixels is not None or needs_tower(self.model):
            hidden = hidden_with_images(self.model, batch, layout)
        else:
            if experts or batch.expert_costs is not None:
                layout = layout | {"output_router_logits": True}
            found = self.body(input_ids=batch.input_ids, use_cache=False, **layout)
            if experts:
                top_k = int(self.model.config.get_text_config().num_experts_per_tok)
                return expert_sums(found.router_logits, batch, top_k)
            hidden = found.last_hidden_state
        scores = self.head.scores
        if scores is not None:
            scores.importance = score_shares(batch, None, scores.averages)
        self.head.collisions = None
        if batch.gives_log_weights and not tokens:
            self.head.collisions = hidden.new_empty(len(batch.targets), dtype=torch.float32)
        token_logps: Tensor = self.head(hidden, batch)
        if tokens:
            return token_logps
        if batch.ref_token_logps is not None:
            z, omega = importance_weighted(token_logps, batch.ref_token_logps, batch)
            if scores is not None:
                scores.importance = score_shares(batch, omega, scores.averages)
        elif batch.token_weights is not None:
            z = sum_per_side(batch.token_weights * token_logps, batch)
        else:
            z = sum_per_side(token_logps, batch)
        more = self._more(token_logps.detach(), batch)
        if batch.expert_costs is not None:
            more.append(cost_of(found.router_logits, batch, batch.expert_costs).expand_as(z))
        return torch.cat([z, *more]) if more else z

    def _more(self, token_logps: Tensor, batch: PairBatch) -> list[Tensor]:
        """What `read` finds behind z."""
        rows = [] if batch.token_weights is None else [sum_per_side(token_logps, batch)]
        if self.head.collisions is not None:
            totals = sum_per_side(token_logps - self.head.collisions, batch)
            rows.append(totals / batch.lengths.clamp(min=1))
            self.head.collisions = None
        return rows

    def _by_own_logits(self, batch: PairBatch) -> Tensor:
        images = own_inputs(self.model, batch.input_ids, batch.pixels)
        logits = self.model(input_ids=batch.input_ids, use_cache=False, **images).logits
        picked = logits.flatten(0, 1).index_select(0, batch.token_positions).float()
        return picked.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)


def _output_projection(model: PreTrainedModel) -> nn.Linear:
    """The linear output head. Raises UserError where the model has another kind."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model.path: {type(model).__name__} has {type(head).__name__} as its output head; give a model "
            "with a linear one"
        )
    return head
