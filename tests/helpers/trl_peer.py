"""TRL's own trainers on a tiny model: loss and gradient of one batch, and the pairs of that batch.

TRL tokenises and collates its own data sets of words; what it made of them is read back as pairs, so that
both see the same token ids. Imports TRL, which is an optional package.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from helpers.tiny_models import make_llama, make_mixtral
from helpers.tiny_tokenizers import make_words
from rcpo.data.pairs import NO_SIDE, TokenizedPair, TokenizedSide

TEXTS = (
    ("a b c", " d e f g", " h i"),
    ("b", " c", " a f e d c"),
    ("e f", " g h i", " j k l"),
    ("k l m n", " o p", " q r s t u"),
    ("v w", " x y z a b c", " d"),
    ("q a", " c c", " e g h"),
)
"""Prompt, chosen and rejected response; lengths that differ within and between pairs."""


class Peer(NamedTuple):
    """One batch as a trainer of TRL sees it."""

    pairs: list[TokenizedPair]
    loss: float
    gradient: dict[str, Tensor]
    """By parameter, of the loss."""


def policy_and_reference(experts: bool = False) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models that are neither equal nor far apart; `experts`: mixtures of them."""
    make: Callable[..., PreTrainedModel] = make_mixtral if experts else make_llama
    policy, reference = make(), make()
    other = make(seed=1).state_dict()
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            weight.lerp_(other[name], 0.2)
    return policy, reference


def peer(
    trainer: str, keys: dict[str, Any], folder: Path, unpaired: bool = False, only: int | None = None
) -> Peer:
    """`keys` are of the trainer's own config class; `unpaired`: of single answers, more chosen ones than
    rejected ones; `only`: of this row alone (DPOTrainer)."""
    policy, reference = policy_and_reference("router_aux_loss_coef" in keys)
    maker, reader = (_kto_unpaired, _of_answers) if unpaired else (MAKERS[trainer], READERS[trainer])
    made = maker(policy, reference, keys, folder)
    rows = range(len(made.train_dataset)) if only is None else [only]
    batch = made.data_collator([made.train_dataset[row] for row in rows])
    policy.train()
    loss = made.compute_loss(policy, batch)
    loss.backward()
    gradient = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    return Peer(reader(batch), float(loss.detach()), gradient)


def _arguments(folder: Path, rows: int, keys: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": rows, "max_steps": 1, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 0, **keys,
    }  # fmt: skip


def _tokenizer() -> Any:
    tokenizer = make_words()
    tokenizer.pad_token = "[?]"
    return tokenizer


def _paired() -> Dataset:
    return Dataset.from_list(
        [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in TEXTS]
    )


def _dpo(policy: PreTrainedModel, reference: PreTrainedModel, keys: dict[str, Any], folder: Path) -> Any:
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=policy, ref_model=reference, args=DPOConfig(**_arguments(folder, len(TEXTS), keys)),
        train_dataset=_paired(), processing_class=_tokenizer(),
    )  # fmt: skip


def _cpo(policy: PreTrainedModel, reference: PreTrainedModel, keys: dict[str, Any], folder: Path) -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer(
        model=policy, args=CPOConfig(**_arguments(folder, len(TEXTS), keys)),
        train_dataset=_paired(), processing_class=_tokenizer(),
    )  # fmt: skip


def _orpo(policy: PreTrainedModel, reference: PreTrainedModel, keys: dict[str, Any], folder: Path) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer(
        model=policy, args=ORPOConfig(**_arguments(folder, len(TEXTS), keys)),
        train_dataset=_paired(), processing_class=_tokenizer(),
    )  # fmt: skip


def _tpo(policy: PreTrainedModel, reference: PreTrainedModel, keys: dict[str, Any], folder: Path) -> Any:
    """With a gold response, which TRL calls the reference: the chosen one of the pair after."""
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    rows = _paired()
    return TPOTrainer(
        model=policy, args=TPOConfig(**_arguments(folder, len(TEXTS), keys)),
        train_dataset=rows.add_column("reference", [*rows["chosen"][1:], rows["chosen"][0]]),
        processing_class=_tokenizer(),
    )  # fmt: skip


def _kto(policy: PreTrainedModel, reference: PreTrainedModel, keys: dict[str, Any], folder: Path) -> Any:
    """TRL takes a row's mismatched response from the row before it. In this order, chosen responses from the
    last pair to the first and then the rejected ones likewise, those are the responses of the pair after."""
    rows = [{"prompt": text[0], "completion": text[1], "label": True} for text in reversed(TEXTS)]
    rows += [{"prompt": text[0], "completion": text[2], "label": False} for text in reversed(TEXTS)]
    return _kto_of(rows, policy, reference, keys, folder)


def _kto_unpaired(
    policy: PreTrainedModel, reference: PreTrainedModel, keys: dict[str, Any], folder: Path
) -> Any:
    """Six chosen and three rejected answers, in a mixed order."""
    rows = []
    for number, (prompt, chosen, rejected) in enumerate(TEXTS):
        rows.append({"prompt": prompt, "completion": chosen, "label": True})
        if number % 2:
            rows.append({"prompt": prompt, "completion": rejected, "label": False})
    return _kto_of(rows, policy, reference, keys, folder)


def _kto_of(
    rows: list[dict[str, Any]],
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    keys: dict[str, Any],
    folder: Path,
) -> Any:
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer(
        model=policy, ref_model=reference,
        args=KTOConfig(
            **_arguments(folder, len(rows), {"train_sampling_strategy": "sequential", **keys})
        ),
        train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(),
    )  # fmt: skip


def sft_peer(
    conversations: list[list[dict[str, str]]], template: str, folder: Path
) -> tuple[Peer, list[TokenizedSide]]:
    """SFTTrainer with assistant_only_loss: its loss of these conversations, and its tokens with its masks."""
    from trl import SFTConfig, SFTTrainer

    policy, _ = policy_and_reference()
    tokenizer = _tokenizer()
    tokenizer.chat_template = template
    made = SFTTrainer(
        model=policy,
        args=SFTConfig(**_arguments(folder, len(conversations), {"assistant_only_loss": True})),
        train_dataset=Dataset.from_list([{"messages": each} for each in conversations]),
        processing_class=tokenizer,
    )
    rows = [made.train_dataset[row] for row in range(len(conversations))]
    batch = made.data_collator(rows)
    policy.train()
    loss = made.compute_loss(policy, batch)
    loss.backward()
    gradient = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    sides = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        scored = np.array(labels) != -100
        first, last = scored.argmax(), len(scored) - scored[::-1].argmax()
        mask = scored[first:last]
        sides.append(TokenizedSide(ids[:last], int(first), None if mask.all() else mask))
    return Peer([], float(loss.detach()), gradient), sides


MAKERS = {
    "DPOTrainer": _dpo,
    "CPOTrainer": _cpo,
    "ORPOTrainer": _orpo,
    "TPOTrainer": _tpo,
    "KTOTrainer": _kto,
}


def _sides(ids: Tensor, is_response: Tensor) -> list[TokenizedSide]:
    """Rows padded on the right, from what of them is response."""
    sides = []
    for row, mask in zip(ids.tolist(), is_response.tolist(), strict=True):
        first = mask.index(True)
        sides.append(TokenizedSide(row[: first + sum(mask)], first))
    return sides


def _pairs(chosen: list[TokenizedSide], rejected: list[TokenizedSide]) -> list[TokenizedPair]:
    return [TokenizedPair(*sides, row=row) for row, sides in enumerate(zip(chosen, rejected, strict=True))]


def _of_masks(batch: dict[str, Tensor]) -> list[TokenizedPair]:
    sides = _sides(batch["input_ids"], batch["completion_mask"].bool())
    num = min(len(TEXTS), len(sides) // 2)
    pairs = _pairs(sides[:num], sides[num : 2 * num])
    golden = sides[2 * num :]
    return [replace(pair, gold=side) for pair, side in zip(pairs, golden, strict=True)] if golden else pairs


def _of_labels(batch: dict[str, Tensor]) -> list[TokenizedPair]:
    chosen, rejected = (
        _sides(batch[f"{side}_input_ids"], batch[f"{side}_labels"] != -100) for side in ("chosen", "rejected")
    )
    return _pairs(chosen, rejected)


def _of_kto(batch: dict[str, Tensor]) -> list[TokenizedPair]:
    """Back in the order of the texts."""
    backwards = _of_masks(batch)
    return [TokenizedPair(pair.chosen, pair.rejected, row=row) for row, pair in enumerate(backwards[::-1])]


def _of_answers(batch: dict[str, Tensor]) -> list[TokenizedPair]:
    """Single answers from the last row to the first: of each the one after it is then the row before."""
    sides = _sides(batch["input_ids"], batch["completion_mask"].bool())
    both = [
        (side, NO_SIDE) if label else (NO_SIDE, side)
        for side, label in zip(sides, batch["label"], strict=True)
    ]
    return [TokenizedPair(*sides, row=row) for row, sides in enumerate(reversed(both))]


READERS = {
    "DPOTrainer": _of_masks,
    "CPOTrainer": _of_labels,
    "ORPOTrainer": _of_labels,
    "TPOTrainer": _of_masks,
    "KTOTrainer": _of_kto,
}
