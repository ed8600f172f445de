"""The table of TRL's losses in rcpo/objectives/README.md, loss by loss against TRL's own trainers: their loss
of a batch and its gradient, and those of rcpo's step on the same token ids, in micro-batches of its own."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cases import Case, Layout, make_config
from helpers.small_engine import SmallEngine, train_small
from helpers.tiny_tokenizers import chat, make_words
from rcpo.common.conf import conf_dir
from rcpo.data.tokenize import tokenize_records
from rcpo.records.conversations import read_conversation

ROOT = Path(__file__).parents[2]
LEARNING_RATE = 100.0
"""So large that the gradient can be read off the weights."""


def table() -> list[tuple[str, str, str]]:
    """(trainer, its keys, rcpo's words) of each line of the table."""
    text = (ROOT / "rcpo" / "objectives" / "README.md").read_text(encoding="utf-8")
    section = text.split("## From TRL", 1)[1].split("\n## ", 1)[0]
    lines = re.findall(r"^\| (\w+Trainer) \| `([^`]*)` \| `([^`]*)` \|", section, re.MULTILINE)
    return lines


def keys_of(text: str) -> dict[str, Any]:
    """Keyword arguments in Python's words."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}


def test_the_table_is_there() -> None:
    """Every loss of TRL's pairwise trainers has a line."""
    assert conf_dir().is_dir()
    assert len(table()) >= 20


TURNS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|turn|> {{ m['content'] }} {% else %}<|turn|> z "
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|> z {% endif %}"
)
SAID = (("a b", "c d e", "f", "g h"), ("i", "j"), ("k", "l", "m n o", "p", "q", "r s t"))


@pytest.mark.ci("TRL's SFTTrainer", needs="trl")
def test_conversations_are_sfttrainer_s(tmp_path: Path) -> None:
    """With assistant_only_loss: the same tokens and masks, the same loss and gradient."""
    from helpers.trl_peer import policy_and_reference, sft_peer

    conversations = [chat(*said) for said in SAID]
    found, sides = sft_peer(conversations, TURNS, tmp_path)
    tokenizer = make_words()
    tokenizer.chat_template = TURNS
    records = [read_conversation(turns, row) for row, turns in enumerate(conversations)]
    pairs = list(tokenize_records(records, tokenizer, 64, None, "error").pairs)
    assert [pair.chosen for pair in pairs] == sides
    policy, _ = policy_and_reference()
    config = make_config(
        tmp_path, tmp_path / "run", Case("sft", "off", "llama", "sgd"), Layout(1, 2),
        "objective.sft_mean=tokens", f"optim.lr={LEARNING_RATE}", "train.grad_clip=0",
    )  # fmt: skip
    assert_equals_peer(policy, pairs, config, (1, 1, 1), None, found)


@pytest.mark.ci("TRL's own losses", needs="trl")
@pytest.mark.parametrize("line", table(), ids=lambda line: f"{line[0]}-{line[1]}")
def test_a_line_is_true(line: tuple[str, str, str], tmp_path: Path) -> None:
    """Loss to 1e-5 of its size, gradient to 1e-5 of its norm."""
    from helpers.trl_peer import peer, policy_and_reference

    trainer, keys, words = line
    unpaired = "data.unpair=true" in words
    found = peer(trainer, keys_of(keys), tmp_path, unpaired)
    policy, reference = policy_and_reference("model.router_loss" in words)
    config = make_config(
        tmp_path, tmp_path / "run", Case("dpo", "off", "llama", "sgd"), Layout(1, 2), *shlex.split(words),
        f"optim.lr={LEARNING_RATE}", "train.grad_clip=0",
    )  # fmt: skip
    frozen = SmallEngine(reference, config, 1)
    parts = (3, 3, 3) if unpaired else (2, 2, 2)
    assert_equals_peer(policy, found.pairs, config, parts, frozen, found)


def assert_equals_peer(
    policy: Any, pairs: Any, config: Any, parts: tuple[int, ...], frozen: SmallEngine | None, found: Any
) -> None:
    """Loss of a step to 1e-5 of its size, gradient to 1e-5 of its norm."""
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    (row,) = train_small(policy, pairs, config, 1, parts, frozen)
    assert row["train/loss"] == pytest.approx(found.loss, rel=1e-5)
    difference = squared = 0.0
    for name, weight in policy.named_parameters():
        ours = (before[name] - weight.detach()) / LEARNING_RATE
        theirs = found.gradient.get(name, torch.zeros_like(ours))
        difference += float((ours - theirs).square().sum())
        squared += float(theirs.square().sum())
    print(f"{abs(row['train/loss'] / found.loss - 1):.1e} {(difference / squared) ** 0.5:.1e}")
    assert difference <= (1e-5) ** 2 * squared


@pytest.mark.ci("TRL's own losses", needs="trl")
def test_likelihood_beside_wpo_is_trl_s_of_one_pair_at_a_time(tmp_path: Path) -> None:
    """TRL 1.16 multiplies an expanded tensor in place, which torch refuses for two pairs and more."""
    from helpers.trl_peer import Peer, peer, policy_and_reference

    keys = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "use_weighting": True}
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        peer("DPOTrainer", keys, tmp_path / "all")
    found = [peer("DPOTrainer", keys, tmp_path / str(row), only=row) for row in range(6)]
    mean = {name: sum(each.gradient[name] for each in found) / 6 for name in found[0].gradient}
    whole = Peer([pair for each in found for pair in each.pairs], sum(each.loss for each in found) / 6, mean)
    policy, reference = policy_and_reference()
    config = make_config(
        tmp_path, tmp_path / "run", Case("mix", "off", "llama", "sgd"), Layout(1, 2), "objective.wpo=true",
        "objective.terms=[{name: dpo}, {name: sft, weight: 0.5}]", "objective.sft_mean=pairs",
        f"optim.lr={LEARNING_RATE}", "train.grad_clip=0",
    )  # fmt: skip
    assert_equals_peer(policy, whole.pairs, config, (2, 2, 2), SmallEngine(reference, config, 1), whole)
