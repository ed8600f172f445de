"""The baseline trl: TRL's DPOTrainer on the same token ids, pairs and reference log-probs.

Its own trainer, collator, fused head and metrics; data are handed over tokenised and in the bench's order,
rows with pictures as they are, with the optimizer of the bench, in bf16 with fp32 weights under autocast as
`rcpo.bench.loops`, and without gradient checkpointing unless the bench has it.
Called by `rcpo.bench.block`; TRL is an optional package.
"""

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from rcpo.bench import images
from rcpo.bench.loops import with_fp32_weights
from rcpo.bench.recorder import BenchDone, Recorder, gradients_of
from rcpo.bench.work import Work
from rcpo.common.errors import UserError
from rcpo.data.pictures import sight_of
from rcpo.engine.engine import accumulation_steps, build_optimizer
from rcpo.models.load import load_frozen_model, load_model

LOSSES = {"dpo": "sigmoid", "hinge": "hinge"}
"""Objectives that TRL computes as rcpo does, with a beta."""


def dataset_of(work: Work) -> Dataset:
    """The pairs of all steps, in order, in the columns that TRL tokenises to."""
    order = [idx for batch in work.batches for idx in batch]
    pairs = [work.inputs.train[idx] for idx in order]
    return Dataset.from_dict(
        {
            "prompt_ids": [pair.chosen.input_ids[: pair.chosen.num_prompt] for pair in pairs],
            "chosen_ids": [pair.chosen.input_ids[pair.chosen.num_prompt :] for pair in pairs],
            "rejected_ids": [pair.rejected.input_ids[pair.rejected.num_prompt :] for pair in pairs],
            "ref_chosen_logps": work.reference.z_w[order].tolist(),
            "ref_rejected_logps": work.reference.z_l[order].tolist(),
        }
    )


def rows_with_images(work: Work) -> Dataset:
    """The same as rows with pictures, which TRL tokenises batch by batch."""
    order = [idx for batch in work.batches for idx in batch]
    rows = images.rows_of(work.folder)
    return Dataset.from_list([rows[work.inputs.train[idx].row] for idx in order])


def collator_of(processor: Any) -> Any:
    """TRL's own for pictures, which are read before it."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    inner = DataCollatorForVisionPreference(processor)
    return lambda rows: inner([images.opened(row) for row in rows])


def arguments_of(work: Work, recorder: Recorder, has_reference: bool) -> Any:
    """TRL's settings for those of the bench; without `has_reference` its own runs in every step."""
    from trl import DPOConfig

    config = work.config
    return DPOConfig(
        output_dir=str(work.run.path / "trl"),
        beta=config.objective["beta"],
        loss_type=[LOSSES[config.objective["name"]]],
        per_device_train_batch_size=config.train.pairs_per_device,
        gradient_accumulation_steps=accumulation_steps(config),
        max_steps=recorder.num_steps,
        max_length=None,
        max_grad_norm=0.0 if recorder.block.mode == "check" else config.train.grad_clip,
        precompute_ref_log_probs=has_reference,  # of images TRL has none
        bf16=config.model.dtype == "bfloat16",
        gradient_checkpointing=config.model.gradient_checkpointing,
        use_cpu=recorder.device.type == "cpu",
        dataloader_pin_memory=recorder.device.type == "cuda",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def run_trl(work: Work, recorder: Recorder) -> None:
    """Train with TRL until the recorder has seen enough. Raises UserError for what TRL does otherwise."""
    from trl import DPOTrainer

    config = work.config
    refuse(config.objective["name"])
    sight = sight_of(work.inputs.tokenizer)
    if sight is None:
        refuse_two_prompts(work)

    class Prepared(DPOTrainer):
        """DPOTrainer on data that are tokenised, referenced and ordered already."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            watch.losses.append(loss.detach())
            watch.computed += inputs["input_ids"].numel()
            return loss

    model = load_model(with_fp32_weights(config.model)).to(recorder.device)
    watch = _Watch(recorder)
    optimizer = build_optimizer(config.optim, [each for each in model.parameters() if each.requires_grad])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Prepared(
        model=model, args=arguments_of(work, recorder, sight is None),
        train_dataset=dataset_of(work) if sight is None else rows_with_images(work),
        processing_class=work.inputs.tokenizer if sight is None else sight.processor,
        data_collator=None if sight is None else collator_of(sight.processor),
        ref_model=None if sight is None else load_frozen_model(config.model).to(recorder.device),
        optimizers=(optimizer, schedule), callbacks=[watch],
    )  # fmt: skip
    try:
        trainer.train()
    except BenchDone:
        return


def refuse_two_prompts(work: Work) -> None:
    """Raise UserError where the sides of a pair do not share their prompt: TRL's format holds one."""
    if any(
        pair.chosen.input_ids[: pair.chosen.num_prompt] != pair.rejected.input_ids[: pair.rejected.num_prompt]
        for pair in work.inputs.train
    ):
        raise UserError(
            "--baseline trl: a pair has two prompts, cut differently; type train.max_prompt_length=N"
        )


def refuse(objective: str) -> None:
    """Raise UserError for an objective that TRL has not, or computes otherwise."""
    if objective not in LOSSES:
        raise UserError(
            f"objective={objective}: TRL has no such loss, or another one; type one of "
            f"{', '.join(f'objective={name}' for name in LOSSES)}, or leave --baseline trl out"
        )


class _Watch(TrainerCallback):
    """Tells the recorder of steps and of the first gradient."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.losses: list[torch.Tensor] = []
        self.computed = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recorder.wants_gradient:
            self._recorder.take_gradient(gradients_of(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss, computed = float(torch.stack(self.losses).mean()), self.computed
        self.losses, self.computed = [], 0
        self._recorder.end_step(loss, computed)
