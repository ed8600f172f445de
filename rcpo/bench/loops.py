"""The baselines in plain torch: what one would write for a paper, doing the same work as rcpo.

    plain     right-padded batches, logits of every position, log-softmax, gather
    response  the same, but the output head sees response positions only

Both take micro-batches in the order in which pairs are drawn, train with the same optimizer, clip likewise
and know the reference log-probs. In bf16 their weights are fp32 under autocast: rcpo's optimizer has fp32
weights too, and stepping bare bf16 weights would be less work for a worse update. Any objective without
batch statistics is theirs too. Called by
`rcpo.bench.block`.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rcpo.bench.recorder import BenchDone, Recorder, gradients_of
from rcpo.bench.work import Work, rows_of
from rcpo.config.schema import ModelConfig
from rcpo.data.batch import PairBatch, collate
from rcpo.engine.engine import build_optimizer
from rcpo.models.load import load_model
from rcpo.models.logit_transform import body_of
from rcpo.models.logprobs import sum_per_side
from rcpo.objectives import PairLogProbs, objective_of


def plain_token_logps(model: PreTrainedModel, batch: PairBatch) -> Tensor:
    """Token log-probs (N,) from the logits of all positions."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.float()
    log_shares = F.log_softmax(logits[:, :-1], dim=-1)
    token_logps = log_shares.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
    return F.pad(token_logps, (0, 1)).flatten()[batch.token_positions]


def response_token_logps(model: PreTrainedModel, batch: PairBatch) -> Tensor:
    """Token log-probs (N,) from the logits of response positions."""
    hidden = body_of(model)(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    picked = hidden.flatten(0, 1)[batch.token_positions]
    log_shares = F.log_softmax(model.get_output_embeddings()(picked).float(), dim=-1)
    return log_shares.gather(1, batch.targets[:, None]).squeeze(1)


LOOPS = {"plain": plain_token_logps, "response": response_token_logps}


def with_fp32_weights(config: ModelConfig) -> ModelConfig:
    """The same model, to be loaded in fp32."""
    return dataclasses.replace(config, dtype="float32")


def run_loop(name: str, work: Work, recorder: Recorder) -> None:
    """Train with the loop of that name until the recorder has seen enough."""
    config, device, token_logps = work.config, recorder.device, LOOPS[name]
    model = load_model(with_fp32_weights(config.model)).to(device)
    model.train()
    casts = torch.autocast(device.type, torch.bfloat16, enabled=config.model.dtype == "bfloat16")
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = build_optimizer(config.optim, parameters)
    objective = objective_of(config.objective)
    state = objective.initial_state(0.0)
    try:
        for step in range(recorder.num_steps):
            losses, computed = [], 0
            for indices in work.micro_batches(step):
                pairs = [work.inputs.train[idx] for idx in indices]
                batch = collate(pairs, work.inputs.pad_id).to(device)
                ref_w, ref_l = rows_of(work.reference, indices, device)
                with casts:
                    z_w, z_l = sum_per_side(token_logps(model, batch), batch).chunk(2)
                len_w, len_l = batch.lengths.to(z_w.dtype).chunk(2)
                loss = objective(PairLogProbs(z_w, z_l, ref_w, ref_l, len_w, len_l, state)).sum()
                loss = loss / config.train.pairs_per_step
                loss.backward()
                losses.append(loss.detach())
                computed += batch.input_ids.numel()
            if recorder.wants_gradient:
                recorder.take_gradient(gradients_of(model))
            if config.train.grad_clip > 0:
                torch.nn.utils.clip_grad_norm_(parameters, config.train.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            recorder.end_step(float(torch.stack(losses).sum()), computed)
    except BenchDone:
        return
