"""The work that all blocks of a bench do: written once by the command, read by every block's process.

A folder holds the tokenised pairs, the reference log-probabilities and, with --shape, a random model. Every
contender gets the same ids, references and order of pairs, so none tokenises anything by itself.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rcpo.bench.images import PAIRS as ROWS
from rcpo.config.resolved import ResolvedConfig
from rcpo.data.inputs import Inputs
from rcpo.data.packer import pack
from rcpo.data.pairs import SideLogProbs, TokenizedPair, TokenizedSide
from rcpo.models.load import load_tokenizer
from rcpo.records.account import Account, RowAccount
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.read_inputs import read_inputs

Mode = Literal["reference", "check", "time", "shares", "profile"]
"""reference: compute the reference log-probs. check: loss and gradient of the first step. time: seconds and
memory. shares: where rcpo's time goes. profile: a Chrome trace of the last step."""
CACHE, PAIRS, REFERENCE = "cache", "pairs.safetensors", "reference.safetensors"


@dataclass(frozen=True)
class Block:
    """One process's task."""

    contender: str
    """rcpo, plain, response, trl or twice."""
    mode: Mode
    work: str
    """Folder of the work."""
    run: str
    """Run folder with the frozen config; rcpo's loop writes there."""
    result: str
    """Where the block writes its result as JSON."""
    num_warmup: int
    num_steps: int
    trace: str | None = None
    """Where `profile` writes."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Block":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Work:
    """What a block works with."""

    config: ResolvedConfig
    run: RunFolder
    folder: Path
    inputs: Inputs
    batches: list[list[int]]
    """Indices into `inputs.train`, one optimizer step after another."""
    reference: SideLogProbs
    """Of all training pairs, nan where a pair is in no batch."""

    @classmethod
    def load(cls, block: Block) -> "Work":
        run, config = open_run(block.run)
        if has_images(Path(block.work)):
            inputs = read_inputs(config, keep=False)
            pairs = list(inputs.train)
        else:
            pairs = load_pairs(Path(block.work) / PAIRS)
            account = Account(RowAccount("bench", len(pairs), trained=len(pairs)))
            inputs = Inputs(load_tokenizer(config.model), pack(pairs), pairs[:1], [], account)
        sampler = inputs.sampler(config)
        batches = [sampler.global_batch(step) for step in range(block.num_warmup + block.num_steps)]
        file = Path(block.work) / REFERENCE
        nothing = torch.full((len(pairs),), math.nan)
        values = load_file(file) if file.is_file() else {"z_w": nothing, "z_l": nothing}
        return cls(config, run, Path(block.work), inputs, batches, SideLogProbs(values["z_w"], values["z_l"]))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Of a baseline: in the order of the batch, as drawn."""
        size, batch = self.config.train.pairs_per_device, self.batches[step]
        return [batch[start : start + size] for start in range(0, len(batch), size)]


def has_images(folder: Path) -> bool:
    """Whether the work is of pictures, whose pairs are read as rows."""
    return (folder / ROWS).is_file()


def num_tokens(pairs: Sequence[TokenizedPair]) -> int:
    """Prompt and response of both sides, without padding."""
    return sum(len(pair.chosen.input_ids) + len(pair.rejected.input_ids) for pair in pairs)


def num_response_tokens(pairs: Sequence[TokenizedPair]) -> int:
    return num_tokens(pairs) - sum(pair.chosen.num_prompt + pair.rejected.num_prompt for pair in pairs)


def save_pairs(pairs: Sequence[TokenizedPair], path: Path) -> None:
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    save_file(
        {
            "ids": torch.cat([torch.tensor(side.input_ids, dtype=torch.int32) for side in sides]),
            "lengths": torch.tensor([len(side.input_ids) for side in sides]),
            "prompts": torch.tensor([side.num_prompt for side in sides]),
        },
        path,
    )


def load_pairs(path: Path) -> list[TokenizedPair]:
    """What `save_pairs` wrote, without weights."""
    tensors = load_file(path)
    rows = tensors["ids"].split(tensors["lengths"].tolist())
    sides = [
        TokenizedSide(ids.tolist(), num_prompt)
        for ids, num_prompt in zip(rows, tensors["prompts"].tolist(), strict=True)
    ]
    return [
        TokenizedPair(chosen, rejected, row)
        for row, (chosen, rejected) in enumerate(zip(sides[::2], sides[1::2], strict=True))
    ]


LONGEST = 4
"""How many times the median a random length may be."""


def random_pairs(
    num_pairs: int, num_prompt: int, num_response: int, vocabulary: int, spread: int = 0
) -> list[TokenizedPair]:
    """Pairs of random tokens. `spread`: 100 times the standard deviation of a length's logarithm, around
    these medians and up to `LONGEST` times them; 0: every prompt and every response of the same length."""
    generator = torch.Generator().manual_seed(0)

    def draw(median: int) -> list[int]:
        num = median
        if spread:
            times = math.exp(spread / 100 * float(torch.randn((), generator=generator)))
            num = max(1, round(median * min(LONGEST, times)))
        drawn: list[int] = torch.randint(vocabulary, (num,), generator=generator).tolist()
        return drawn

    pairs = []
    for row in range(num_pairs):
        prompt = draw(num_prompt)
        chosen, rejected = (TokenizedSide(prompt + draw(num_response), len(prompt)) for _ in range(2))
        pairs.append(TokenizedPair(chosen, rejected, row))
    return pairs


def moved(z: SideLogProbs, pairs: Sequence[TokenizedPair]) -> SideLogProbs:
    """Up to a nat away from z, by what is in the side: at the true reference every pair's loss is the same,
    log 2 for DPO, and says nothing about the pairs."""

    def shift(side: TokenizedSide) -> float:
        return math.sin(sum(side.input_ids))

    return SideLogProbs(
        z.z_w + torch.tensor([shift(pair.chosen) for pair in pairs]),
        z.z_l + torch.tensor([shift(pair.rejected) for pair in pairs]),
    )


def rows_of(values: SideLogProbs, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ref_w, ref_l) of these pairs, each (B,)."""
    return values.z_w[indices].to(device), values.z_l[indices].to(device)


def write_model(shape: dict[str, int], like: ResolvedConfig, folder: Path) -> None:
    """A random Llama of `shape`, with the tokenizer of `like`'s model: in fp32, or in bf16 where that is what
    is trained; drawn on the GPU where there is one."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=like.train.max_length,
        tie_word_embeddings=False,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16 if like.model.dtype == "bfloat16" else torch.float32).save_pretrained(folder)
    load_tokenizer(like.model).save_pretrained(folder)
