"""The policy: a causal language model read as a function from pairs to summed log-probabilities, without full
logits.

Does not own loading (`rcpo.models.load`) or training: `rcpo.engine.engine` wraps it."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from rcpo.common.errors import UserError
from rcpo.data.batch import PairBatch
from rcpo.models.attention import attention_inputs
from rcpo.models.logit_transform import body_of, logit_transform
from rcpo.models.logprobs import TokenLogProbHead, importance_weighted, score_shares, sum_per_side
from rcpo.models.vision import hidden_with_images, own_inputs


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
        layout = attention_inputs(self.model, batch)
        if batch.pixels is None:
            hidden = self.body(input_ids=batch.input_ids, use_cache=False, **layout).last_hidden_state
        else:
            hidden = hidden_with_images(self.model, batch, layout)
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
        images = own_inputs(self.model, batch)
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
