"""The policy: a causal language model read as a function from pairs to summed log-probabilities, without full
logits.

Does not own loading (`rcpo.models.load`) or training: `rcpo.models.engine` wraps it."""

import inspect

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.data.batch import PairBatch, Segments
from rcpo.models.logit_transform import body_of, logit_transform
from rcpo.models.logprobs import TokenLogProbHead, importance_weighted, score_shares, sum_per_side


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

    def forward(self, batch: PairBatch, tokens: bool = False, own_logits: bool = False) -> Tensor:
        """z (2B,) fp32: 0..B-1 chosen, B..2B-1 rejected; with `tokens` the token log-probs (N,), with
        `own_logits` by the model's own forward method, logits and all. Where the batch has the reference's,
        z is weighted by importance.

        Rows are padded on the right, so causal attention keeps padding out of every real position without a
        mask; a joint layout needs one.
        """
        if own_logits:
            return self._by_own_logits(batch)
        joint: dict[str, Tensor | None] = {}
        if batch.segments is not None:
            mask = self._attention_mask(batch.segments)
            joint = {"attention_mask": mask, "position_ids": batch.position_ids}
        hidden = self.body(input_ids=batch.input_ids, use_cache=False, **joint).last_hidden_state
        scores = self.head.scores
        if scores is not None:
            scores.importance = score_shares(batch, None, scores.averages)
        token_logps: Tensor = self.head(hidden, batch)
        if tokens:
            return token_logps
        if batch.ref_token_logps is None:
            return sum_per_side(token_logps, batch)
        z, omega = importance_weighted(token_logps, batch.ref_token_logps, batch)
        if scores is not None:
            scores.importance = score_shares(batch, omega, scores.averages)
        return z

    def _by_own_logits(self, batch: PairBatch) -> Tensor:
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits
        picked = logits.flatten(0, 1).index_select(0, batch.token_positions).float()
        return picked.log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)

    def _attention_mask(self, segments: Segments) -> Tensor | None:
        """(R, 1, T, T): who sees whom, as bool for sdpa and as what is added to the scores for eager. flash
        attention takes none: it reads off the positions where a packed sequence begins."""
        kernel = self.model.config._attn_implementation
        if kernel == "flash_attention_2":
            return None
        seen = segments.seen().unsqueeze(1)
        if kernel == "sdpa":
            return seen
        dtype = self.model.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


FULL = {"full_attention", "attention"}
WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
)
"""Config entries of a window, where `layer_types` does not tell."""


def refuse_joint_layout(model: PreTrainedModel, share_prefix: bool) -> None:
    """Raise UserError where a prompt cannot be computed once for both responses, or sequences cannot share a
    row: attention without masks, positions that are not given, windows that a mask of one's own would do
    away with, or layers with a state. What the config does not tell, `rcpo.training.agreement` finds."""
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    recurrent = sorted(kind for kind in kinds if "attention" not in kind or kind == "linear_attention")
    takes = inspect.signature(body_of(model).forward).parameters
    kernel = model.config._attn_implementation
    why = None
    if kernel not in ("sdpa", "eager") and (share_prefix or kernel != "flash_attention_2"):
        why = f"{kernel} takes no mask; type model.attention=sdpa"
    elif recurrent:
        why = f"a {recurrent[0]} layer goes on from what stands before on the row"
    elif kinds - FULL or any(getattr(config, key, None) is not None for key in WINDOWS):
        why = "it attends within windows"
    elif not {"position_ids", "attention_mask"} <= set(takes):
        why = "it takes no position_ids"
    if why is not None:
        key, what = (
            ("share_prefix", "compute a prompt once for both responses")
            if share_prefix
            else ("packing", "have several sequences on a row")
        )
        raise UserError(f"train.{key}=true: {name} cannot {what}: {why}; or type train.{key}=false")


def _output_projection(model: PreTrainedModel) -> nn.Linear:
    """The linear output head. Raises UserError where the model has another kind."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model.path: {type(model).__name__} has {type(head).__name__} as its output head; give a model "
            "with a linear one"
        )
    return head
