"""Reward models whose scores are known: the last token's word decides."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rcpo.models.load import model_place


def make_classifier(
    folder: Path, scores: Mapping[str, float], *, num_labels: int = 1, positions: int = 32
) -> None:
    """A sequence classifier with the embedded model's tokenizer. A conversation that ends in one of these
    words has its score, and any other 0: there is no layer, and no other token has an embedding. The norm
    makes each embedding (s, 0, 0, 0) the same length, so that the score is put into the direction: a word's
    is (cos, sin) of an angle whose cosine it is, and the head reads the first number."""
    tokenizer = AutoTokenizer.from_pretrained(model_place("builtin:tiny"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=4, intermediate_size=4, num_hidden_layers=0,
        num_attention_heads=1, num_labels=num_labels, max_position_embeddings=positions, rms_norm_eps=1e-12,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.zero_()
        for word, score in scores.items():
            number = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(f" {word}")[-1])
            embeddings[number, :2] = torch.tensor([score, (1 - score**2) ** 0.5])
        model.score.weight.zero_()[:, 0] = 0.5  # the norm makes a unit vector sqrt(4) long
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
