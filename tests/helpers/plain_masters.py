"""The oracle of bf16 trainings: bf16 weights go forward and back, fp32 weights are stepped, in plain torch.

z by rcpo's own forward pass in the micro-batches of all ranks, so that rounding is the same; their gradients
are added up in fp32, losses and incentives are those of `plain_loop`. Without calibration.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers.plain_loop import Sides, loss_and_incentives
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.batch import collate
from rcpo.models.policy import Policy
from rcpo.training.read_inputs import read_inputs


def train_masters(config: ResolvedConfig) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The fp32 weights before and after every step of a run, and the loss of each step."""
    inputs = read_inputs(config)
    sampler = inputs.sampler(config)
    load = AutoModelForCausalLM.from_pretrained
    model, start = (load(config.model.path, dtype=torch.bfloat16) for _ in range(2))
    policy, reference = Policy(model), Policy(start)
    parameters = list(model.parameters())
    stepped = [parameter.detach().float() for parameter in parameters]
    optimizer = (
        torch.optim.SGD(stepped, lr=config.optim.lr)
        if config.optim.name == "sgd"
        else torch.optim.AdamW(stepped, lr=config.optim.lr, eps=config.optim.eps, weight_decay=0)
    )
    names = [name for name, _ in model.named_parameters()]
    found, losses = [_copies(names, stepped)], []
    for step in range(inputs.num_steps(config)):
        cut = list(sampler.micro_batches(step, 0, 1, config.train.pairs_per_device))
        for master in stepped:
            master.grad = torch.zeros_like(master)
        losses.append(0.0)
        for indices in cut:
            pairs = [inputs.train[idx] for idx in indices]
            batch = collate(pairs, inputs.pad_id)
            z = policy(batch)
            with torch.no_grad():
                ref = Sides(*reference(batch).chunk(2))
            leaves = Sides(*z.detach().chunk(2))
            loss, d_w, d_l = loss_and_incentives(config.objective["name"], leaves, ref, pairs)
            losses[-1] += float(loss.mean()) / len(cut)
            (torch.cat([-d_w, d_l]) @ z / len(pairs) / len(cut)).backward()
            for master, parameter in zip(stepped, parameters, strict=True):
                master.grad += parameter.grad
                parameter.grad = None
        if config.train.grad_clip:
            torch.nn.utils.clip_grad_norm_(stepped, config.train.grad_clip)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(stepped, parameters, strict=True):
                parameter.copy_(master)
        found.append(_copies(names, stepped))
    return found, losses


def _copies(names: Sequence[str], stepped: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: master.clone() for name, master in zip(names, stepped, strict=True)}
