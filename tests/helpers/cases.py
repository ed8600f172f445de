"""What is trained in tests: cases, how they are laid out over ranks, the inputs and the frozen config."""

import copy
import functools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import MODELS, VOCABULARY
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.validate import validate
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree

PAIRS_PER_STEP, NUM_STEPS = 8, 6
RELEASING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""ZeRO-3 settings that shard and release even parameters this small; by default they stay gathered."""


@dataclass(frozen=True)
class Case:
    """What is trained; how it is spread over ranks and micro-batches is none of its business."""

    objective: str
    calibration: str
    model: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.objective}-{self.calibration}-{self.model}-{self.optimizer}"

    @property
    def lr(self) -> float:
        return 0.02 if self.optimizer == "sgd" else 0.003


@dataclass(frozen=True)
class Layout:
    ranks: int
    pairs_per_device: int
    stage: int = 1

    def __str__(self) -> str:
        accumulation = PAIRS_PER_STEP // self.ranks // self.pairs_per_device
        return f"{self.ranks}ranks-{self.pairs_per_device}x{accumulation}-zero{self.stage}"


def write_inputs(folder: Path) -> None:
    """Every tiny model with a tokenizer of words "w3" ... "w36" (ids 3 ... 36), and pairs of ragged
    lengths: 20 to train on (so that step 3 starts a second pass), 6 held out."""
    names = ["<pad>", "<s>", "</s>", *(f"w{idx}" for idx in range(3, VOCABULARY))]
    words = Tokenizer(WordLevel({name: idx for idx, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(5)

    def text(shortest: int, longest: int) -> str:
        return " ".join(f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randint(shortest, longest)))

    for name, num_pairs in (("train", 20), ("held-out", 6)):
        rows = [
            {"prompt": text(1, 4), "chosen": " " + text(1, 7), "rejected": " " + text(1, 7)}
            for _ in range(num_pairs)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@functools.cache
def _composed(*words: str) -> dict[str, Any]:
    """What Hydra makes of words, which takes a sixth of a second; to be copied before it is changed."""
    tree = compose(list(words))
    assert tree is not None
    return tree


def make_config(inputs: Path, run_dir: Path, case: Case, layout: Layout, *words: str) -> ResolvedConfig:
    """The config as the command line makes it; `words` are further overrides. Paths and the layout are set
    in the composed tree, unless `words` say otherwise."""
    own = [
        f"objective={case.objective}", f"calibration={case.calibration}", f"optim={case.optimizer}",
        f"optim.lr={case.lr}", *(["optim.eps=1e-4"] if case.optimizer == "adamw" else []),
        "data=file", "data.path=pairs.jsonl", "tracking=none", f"train.steps={NUM_STEPS}",
        f"train.pairs_per_step={PAIRS_PER_STEP}", "train.device=cpu", "train.eval_every=4",
    ]  # fmt: skip
    placed = {
        "model.path": str(inputs / case.model), "data.path": str(inputs / "train.jsonl"),
        "data.eval_path": str(inputs / "held-out.jsonl"), "launch.processes": layout.ranks,
        "train.pairs_per_device": layout.pairs_per_device, "deepspeed.stage": layout.stage,
    }  # fmt: skip
    typed = {word.split("=")[0] for word in words}
    tree = copy.deepcopy(_composed(*(word for word in own if word.split("=")[0] not in typed), *words))
    for key, value in placed.items():
        if key not in typed:
            group, name = key.split(".")
            tree[group][name] = value
    tree["run_dir"] = str(run_dir)
    if layout.stage == 3:
        tree["deepspeed"]["extra"] = {"zero_optimization": RELEASING}
    return resolve(validate(tree), None)


def make_run(config: ResolvedConfig) -> RunFolder:
    assert config.run_dir is not None
    run = RunFolder(config.run_dir)
    run.create(config, config_tree(config))
    return run
