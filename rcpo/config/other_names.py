"""What other tools call the keys of rcpo: TRL and the Trainer of transformers, Axolotl, LLaMA-Factory, and
configs of Hydra projects.

Owns the one table of their names, and what to type in place of each. Nothing is accepted under these names: a
word has one spelling. Loads nothing heavy. Called by `rcpo.config.faults` and
`rcpo.commands.flags`.
"""

import re

_NAMES = {
    "objective.beta": "beta dpo_beta pref_beta",
    "objective.gamma": "gamma simpo_gamma",
    "objective.lambda": "cpo_alpha rpo_alpha",
    "objective.tau": "tau",
    "objective.label_smoothing": "label_smoothing",
    "objective.divergence_alpha": "f_alpha_divergence_coef",
    "objective.chosen_weight": "desirable_weight",
    "objective.rejected_weight": "undesirable_weight",
    "optim.lr": "lr learning_rate max_lr peak_lr",
    "optim.weight_decay": "weight_decay wd",
    "optim.eps": "adam_epsilon adam_eps",
    "optim.momentum": "momentum",
    "optim.warmup_steps": "warmup_steps num_warmup_steps warmup",
    "optim.warmup_ratio": "warmup_ratio",
    "optim.smoothing": "rmsprop_alpha",
    "optim.floor": "min_lr_rate min_lr_ratio",
    "optim.schedule": "lr_scheduler_type lr_scheduler scheduler schedule lr_schedule",
    "train.steps": "max_steps steps num_steps num_train_steps train_steps total_steps num_training_steps "
    "max_iters iterations",
    "train.epochs": "epochs num_epochs num_train_epochs max_epochs n_epochs total_epochs",
    "train.pairs_per_device": "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size "
    "per_device_batch_size micro_batch_size_per_gpu train_micro_batch_size_per_gpu",
    "train.max_length": "max_length max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len",
    "train.max_prompt_length": "max_prompt_length",
    "train.grad_clip": "max_grad_norm gradient_clipping grad_clip clip_grad gradient_clip_val max_norm",
    "train.eval_every": "eval_steps eval_every eval_interval eval_freq",
    "train.save_every": "save_steps save_every save_interval checkpoint_every save_freq",
    "train.log_every": "logging_steps log_every log_interval log_every_n_steps",
    "train.keep_last": "save_total_limit keep_last",
    "train.packing": "packing sample_packing",
    "train.device": "device accelerator",
    "train.deterministic": "full_determinism deterministic",
    "model.path": "model_name_or_path model_name model_path model_id base_model pretrained "
    "pretrained_model_name_or_path",
    "model.attention": "attn_implementation attn_impl attention",
    "model.gradient_checkpointing": "gradient_checkpointing activation_checkpointing "
    "use_gradient_checkpointing",
    "model.compile": "torch_compile compile",
    "model.chat_template": "chat_template chat_template_path",
    "model.trust_remote_code": "trust_remote_code",
    "model.lora.rank": "lora_r lora_rank rank",
    "model.lora.alpha": "lora_alpha",
    "model.lora.dropout": "lora_dropout",
    "model.lora.targets": "lora_target_modules target_modules lora_target",
    "reference.path": "ref_model reference_model ref_model_name_or_path ref_path",
    "data.eval_path": "eval_dataset validation_file eval_file eval_data dev_file",
    "data.split": "dataset_split train_split dataset_train_split",
    "data.eval_split": "dataset_test_split eval_split test_split",
    "data.train_pairs": "max_train_samples max_samples max_train_examples",
    "data.eval_pairs": "max_eval_samples eval_samples",
    "data.config": "dataset_config dataset_config_name",
    "deepspeed.stage": "zero_stage zero stage",
    "launch.gpus_per_node": "gpus num_gpus n_gpus ngpus devices nproc_per_node n_gpus_per_node gpus_per_node",
    "launch.processes": "num_processes processes",
    "launch.nodes": "num_nodes nnodes nodes",
    "tracking.project": "project wandb_project project_name",
    "tracking.entity": "entity wandb_entity",
    "tracking.group": "wandb_group",
    "tracking.tags": "tags",
    "run_dir": "output_dir out_dir save_dir log_dir logging_dir work_dir",
    "name": "run_name experiment_name exp_name wandb_name wandb_run_name",
    "seed": "random_seed data_seed",
}
"""A key of rcpo, and names that others give to it; its value is of the same kind there."""
KEY_OF = {name: key for key, names in _NAMES.items() for name in names.split()}

_OBJECTIVES = {
    "sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "kto_pair": "kto", "bco_pair": "bco", "exo_pair": "exo",
    "nca_pair": "nca", "robust": "robust_dpo", "sppo_hard": "sppo", "apo-zero": "apo_zero",
}  # fmt: skip
"""Losses that other tools call otherwise."""
_BATCH = (
    "train.pairs_per_step={value} for the pairs of an optimizer step over all ranks, or "
    "train.pairs_per_device={value} for those of one forward pass"
)
_ACCUMULATION = (
    "train.pairs_per_step=N, the pairs of an optimizer step over all ranks: what ranks and "
    "train.pairs_per_device leave of it is accumulated"
)
ADVICE = {
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "global_batch_size": "train.pairs_per_step={value}",
    "total_batch_size": "train.pairs_per_step={value}",
    "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accum": _ACCUMULATION,
    "accumulate_grad_batches": _ACCUMULATION,
    "per_device_eval_batch_size": "train.pairs_per_device={value}; evaluations take four of them at a time",
    "optimizer": "optim={optimizer}",
    "adam_beta1": "optim.betas=[{value},0.999]",
    "adam_beta2": "optim.betas=[0.9,{value}]",
    "loss_type": "objective={objective}",
    "loss": "objective={objective}",
    "pref_loss": "objective={objective}",
    "algorithm": "objective={objective}",
    "algo": "objective={objective}",
    "method": "objective={objective}",
    "gamma_beta_ratio": "objective=simpo objective.gamma=GAMMA, that ratio times objective.beta",
    "reference_free": "objective.reference_free={value}",
    "f_divergence_type": "objective.divergence={divergence}",
    "dataset": "data=file data.path={value}",
    "dataset_name": "data=file data.path={value}",
    "data_path": "data=file data.path={value}",
    "data_dir": "data=file data.path={value}",
    "train_file": "data=file data.path={value}",
    "train_data": "data=file data.path={value}",
    "bf16": "model.dtype=bfloat16, or float32 (auto: bfloat16 on GPUs)",
    "fp16": "model.dtype=bfloat16: rcpo trains in bfloat16 or float32",
    "fp32": "model.dtype=float32",
    "precision": "model.dtype=bfloat16, or float32",
    "torch_dtype": "model.dtype={value}",
    "dtype": "model.dtype={value}",
    "use_peft": "model.lora.rank=16",
    "use_lora": "model.lora.rank=16",
    "load_in_4bit": "model.quantization=4bit model.lora.rank=16",
    "load_in_8bit": "model.quantization=4bit model.lora.rank=16, or optim=adamw_8bit",
    "use_liger_kernel": "model.kernels=liger",
    "precompute_ref_log_probs": "reference=cached, which is the default",
    "report_to": "tracking={tracking}",
    "wandb": "tracking=wandb, or tracking=none",
    "early_stopping": "train.stop_when='eval/displacement/chosen < -5', or another metric of an evaluation",
    "early_stopping_patience": "train.stop_when='eval/displacement/chosen < -5', or another metric",
    "load_best_model_at_end": "train.keep_best=eval/displacement/margin; the weights are in RUN/best",
    "metric_for_best_model": "train.keep_best=eval/displacement/margin, or eval/loss",
    "generate_during_eval": "metrics.answers=2",
    "alpha": "calibration=fixed calibration.alpha={value}, or calibration=on to have it measured",
    "resume": "rcpo resume RUN in place of rcpo train",
    "resume_from_checkpoint": "rcpo resume RUN in place of rcpo train",
    "overwrite_output_dir": "--overwrite",
    "config": "--config-dir DIR experiment=NAME, for DIR/experiment/NAME.yaml",
}  # fmt: skip
"""Names that are no key's under another name: what to type for each."""


def typed_here(key: str, value: str) -> str | None:
    """What to type in rcpo for KEY=VALUE of another tool, by the key or its last part; None for a name that
    is not known, or is the very key."""
    for name in (key, key.rpartition(".")[2]):
        name = re.sub(r"-", "_", name.lower())
        if name in ADVICE:
            return ADVICE[name].format(
                value=value,
                objective=_OBJECTIVES.get(value, value),
                optimizer=_optimizer(value),
                divergence=value.removesuffix("_divergence"),
                tracking="wandb" if value == "all" else value,
            )
        if KEY_OF.get(name, key) != key:
            return f"{KEY_OF[name]}={value}"
    return None


def _optimizer(name: str) -> str:
    """adam, adamw_torch_fused, paged_adamw_8bit, ... as the options of optim."""
    if "adam" not in name.lower():
        return name
    return "adamw_8bit" if "8bit" in name else "adamw"


def typed_for_flag(flag: str) -> str | None:
    """The same for --flag or --flag=VALUE."""
    key, equals, value = flag.lstrip("-").partition("=")
    return typed_here(key.replace("-", "_"), value if equals else "VALUE")
