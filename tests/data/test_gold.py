"""Gold responses, of which a likelihood term is: what is read, tokenised and lost, and the loss by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny_models import make_llama
from helpers.tiny_tokenizers import make_words, tokenize
from rcpo.config.schema import DataConfig
from rcpo.data.packer import pack
from rcpo.data.pairs import TokenizedPair, TokenizedSide
from rcpo.models.policy import Policy
from rcpo.objectives.composition import objective_of
from rcpo.objectives.loss import PairLogProbs
from rcpo.records.gold import with_gold
from rcpo.records.load import load_records
from rcpo.records.record import BadRowError, read_record
from rcpo.training.gold import gold_row


def test_a_gold_response_is_read_beside_a_pair_and_may_be_its_chosen_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": " a", "rejected": " b", "best": " a"} for n in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source="file", path=str(path), eval_pairs=1, columns={"gold": "best"})
    data = load_records(config, has_gold=True)
    assert {record.gold for record in (*data.train, *data.held_out)} == {" a"}
    assert {record.gold for record in load_records(config).train} == {None}


@pytest.mark.parametrize(
    ("prompt", "gold", "reason"),
    [
        ("q", None, "gold is null"),
        ("q", " ", "gold is empty"),
        ("q", 3, "gold is int, neither text nor messages"),
        (None, " c", "a gold response needs a prompt of its own, and the sides only begin alike"),
        ("other", " c", "the gold response does not share the prompt of the pair"),
    ],
)
def test_gold_responses_that_cannot_train(prompt: Any, gold: Any, reason: str) -> None:
    with pytest.raises(BadRowError, match=f"^{reason}$"):
        with_gold(read_record("q", " a", " b", 0), prompt, gold)


def test_its_tokens_stand_behind_the_pair_s_prompt_and_go_with_the_pair() -> None:
    record = with_gold(read_record("a b", " c", " d", 0), "a b", " e f")
    plain = read_record("g", " c", " d", 1)
    packed = tokenize([record, with_gold(plain, "g", " c")], make_words()).pairs
    first, second = packed
    assert first.gold == TokenizedSide([0, 10, 11, 14, 15, 1], 3)
    assert second.gold == second.chosen
    assert packed.take([1, 0])[1].gold == packed.flipped([0])[0].gold == first.gold
    assert tokenize([plain], make_words()).pairs[0].gold is None


def test_a_likelihood_term_of_it_by_hand() -> None:
    """cpo with beta 1 and lambda 2 of m = 1: -log sigmoid(1) = 0.313262, and of gold z = -6 over 3 tokens
    2 * 2 = 4; chosen and rejected are pulled by the preference alone, +- 0.268941, gold by 2/3."""
    objective = objective_of({"name": "cpo", "beta": 1.0, "lambda": 2.0, "sft_of": "gold"})
    z = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (-4.0, -5.0, -6.0)]
    zero, four = torch.zeros(1).double(), torch.full((1,), 4.0).double()
    pair = PairLogProbs(
        z[0], z[1], zero, zero, four, four, likely=z[2], likely_tokens=torch.tensor([3.0]).double()
    )
    loss = objective(pair)
    assert loss.item() == pytest.approx(4.313262, abs=1e-6)
    found = [grad.item() for grad in torch.autograd.grad(loss.sum(), z)]
    assert found == pytest.approx([-0.268941, 0.268941, -2 / 3], abs=1e-6)


def test_its_displacement_is_against_the_first_evaluation() -> None:
    policy = Policy(make_llama())
    side = TokenizedSide([1, 5, 6, 7], 2)
    pairs = list(
        pack([TokenizedPair(side, TokenizedSide([1, 5, 8], 2), 0, gold=TokenizedSide([1, 5, 9], 2))])
    )

    class Model:
        device = torch.device("cpu")

        def logprobs_without_grad(self, batch: Any, **kwargs: Any) -> torch.Tensor:
            with torch.no_grad():
                return policy(batch)

    model: Any = Model()
    first = gold_row(model, pairs, 0, 1, list)
    assert first["displacement/gold"] == 0
    later = gold_row(model, pairs, 0, 1, lambda: [{"logps/gold": first["logps/gold"] - 2.0}])
    assert later == {"displacement/gold": pytest.approx(2.0), "logps/gold": first["logps/gold"]}
    assert gold_row(model, [TokenizedPair(side, side, 0)], 0, 1, list) == {}
