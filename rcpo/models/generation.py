"""Which tokens end generation, as a model's folder says.

Owns the reading of generation_config.json. What its tokens are for, `rcpo.data.generation` says; called by
`rcpo.models.load`.
"""

from typing import Any

from transformers import GenerationConfig, PretrainedConfig


def end_ids(place: str) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, else of config.json, as transformers' `generate` takes it.

    Nothing where neither file has one or can be had: most models end at their tokenizer's EOS, and what is
    wrong with a folder is for others to say."""
    for read in (_generation_config, _config):
        try:
            found = read(place)
        # Of a broken file, or without a network, each library in turn raises a class of its own.
        except Exception:
            continue
        ids = found if isinstance(found, list) else [found]
        if ids and all(isinstance(idx, int) for idx in ids):
            return tuple(sorted(set(ids)))
    return ()


def _generation_config(place: str) -> Any:
    return GenerationConfig.from_pretrained(place).eos_token_id


def _config(place: str) -> Any:
    """Of the whole model, else of its text part."""
    tree, _ = PretrainedConfig.get_config_dict(place)
    return tree.get("eos_token_id", tree.get("text_config", {}).get("eos_token_id"))
