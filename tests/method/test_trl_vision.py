"""TRL's DPOTrainer on tiny models of two families: the ids, what of them is scored, the loss, its gradient.

One difference, made equal here: TRL encodes every image twice, once for each side. Its loss is the mean over
pairs of -log sigmoid(beta (r_w - r_l)), as rcpo's.
"""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid

from helpers.tiny_vision import make_vision, rows_with_images
from rcpo.config.schema import DataConfig, ModelConfig
from rcpo.data.batch import collate
from rcpo.data.tokenize import tokenize_records
from rcpo.models.load import load_model, load_tokenizer
from rcpo.models.policy import Policy
from rcpo.records.load import load_records

pytestmark = pytest.mark.ci("TRL's own losses", needs="trl")
BETA = 0.1


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_batch_with_images_is_trls(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    model_folder = make_vision(tmp_path / "model", family)
    other_folder = make_vision(tmp_path / "other", family, seed=1)
    rows = rows_with_images(tmp_path, 6, (1, 2, 1))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    config = ModelConfig(path=str(model_folder), dtype="float32", vision="train")
    tokenizer = load_tokenizer(config)
    records = load_records(DataConfig("file", str(tmp_path / "pairs.jsonl"), eval_pairs=1)).train
    pairs = list(tokenize_records(records, tokenizer, 256, None, "error").pairs)
    ours, reference = (
        Policy(load_model(config)),
        load_model(ModelConfig(path=str(other_folder), dtype="float32")),
    )
    batch = collate(pairs, 0)
    with torch.no_grad():
        ref_w, ref_l = Policy(reference)(batch).chunk(2)
    z_w, z_l = ours(batch).chunk(2)
    loss = -logsigmoid(BETA * ((z_w - ref_w) - (z_l - ref_l))).mean()
    loss.backward()

    processor = AutoProcessor.from_pretrained(model_folder, backend="pil")
    theirs = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    kept = [rows[pair.row] for pair in pairs]
    examples = [
        {**row, "images": [image.open() for image in pair.pictures.images]}
        for row, pair in zip(kept, pairs, strict=True)
    ]
    trainer = DPOTrainer(
        model=theirs,
        ref_model=AutoModelForImageTextToText.from_pretrained(other_folder, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=len(pairs), max_steps=1,
            use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], save_strategy="no",
            beta=BETA, max_length=None, disable_dropout=True,
        ),
        train_dataset=Dataset.from_list([dict.fromkeys(("images", "prompt", "chosen", "rejected"), "x")]),
        processing_class=processor,
    )  # fmt: skip
    seen = trainer.data_collator(examples)
    for ids, mask, side in zip(
        seen["input_ids"].tolist(),
        seen["completion_mask"].tolist(),
        [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)],
        strict=True,
    ):
        assert ids[: side.num_tokens] == side.input_ids
        assert mask[: side.num_tokens] == [0] * side.num_prompt + [1] * (side.num_tokens - side.num_prompt)
        assert not any(mask[side.num_tokens :])
    theirs.train()
    their_loss = trainer.compute_loss(theirs, seen)
    their_loss.backward()
    assert abs(float(loss.detach()) - float(their_loss.detach())) < 1e-5
    for (name, mine), (_, other) in zip(
        ours.model.named_parameters(), theirs.named_parameters(), strict=True
    ):
        if mine.grad is not None and other.grad is not None:
            assert torch.allclose(mine.grad, other.grad, atol=1e-5), name
