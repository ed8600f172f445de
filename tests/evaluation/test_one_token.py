"""The one-token experiment: what theory names by hand, words of one token, and trainings of a model whose
unembeddings are set so that the token that gains is known."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcpo import cli
from rcpo.common.errors import UserError
from rcpo.evaluation.one_token import (
    Watched,
    Words,
    builtin_prompts,
    measure,
    named_by_theory,
    rows_of,
    tokens_of,
)
from rcpo.evaluation.subject import find_subject
from rcpo.models.load import model_place

WORDS = Words("seven", "eight")


def test_theory_is_a_product_of_unembeddings() -> None:
    """W_0 - W_1 = (.1, -1). Token 2 = (3, -3): .3 + 3 = 3.3; token 3 = (1, 1): .1 - 1; token 0 itself .1."""
    weight = torch.tensor([[1.0, 0.0], [0.9, 1.0], [3.0, -3.0], [1.0, 1.0]])
    assert named_by_theory(weight, 0, 1).tolist() == pytest.approx([0.1, -0.91, 3.3, -0.9], abs=1e-6)


def test_prompts_of_the_embedded_model_are_answered_by_their_word() -> None:
    tokenizer = find_subject("builtin:tiny").tokenizer()
    prompts = builtin_prompts(WORDS, tokenizer)
    assert len(set(prompts)) == 64
    pairs = tokens_of(rows_of(prompts, WORDS), tokenizer, WORDS)
    ids = {(pair.chosen.input_ids[-1], pair.rejected.input_ids[-1]) for pair in pairs}
    assert ids == {tuple(tokenizer.convert_tokens_to_ids(list(WORDS)))}
    assert all(
        len(side.input_ids) == side.num_prompt + 1 for pair in pairs for side in (pair.chosen, pair.rejected)
    )
    with pytest.raises(UserError, match="Yes is no number word"):
        builtin_prompts(Words("Yes", "No"), tokenizer)


def test_words_of_several_tokens_are_refused() -> None:
    tokenizer = find_subject("builtin:tiny").tokenizer()
    words = Words("seven apples", "eight")
    with pytest.raises(UserError, match=r"seven apples is 2 tokens behind row 0's prompt"):
        tokens_of(rows_of([[{"role": "user", "content": "alice has"}]], words), tokenizer, words)


def test_what_is_measured_is_what_the_models_say() -> None:
    """p(chosen) and what gained most, against the two models' own softmax."""
    tokenizer = find_subject("builtin:tiny").tokenizer()
    prompts = builtin_prompts(WORDS, tokenizer)[:5]
    pairs = tokens_of(rows_of(prompts, WORDS), tokenizer, WORDS)
    models = [find_subject("builtin:tiny").load() for _ in range(2)]
    with torch.no_grad():
        models[1].model.layers[0].mlp.down_proj.weight.mul_(1.5)
    found = measure(*(Watched(model, 0, 2) for model in models), pairs, tokenizer, 3)
    rows = [torch.tensor([pair.chosen.input_ids[:-1]]) for pair in pairs]
    with torch.no_grad():
        before, after = (
            torch.stack([model(ids).logits[0, -1].double().softmax(-1) for ids in rows]) for model in models
        )
    chosen = tokenizer.convert_tokens_to_ids("seven")
    assert found["chosen"]["before"] == pytest.approx(float(before[:, chosen].mean()), abs=1e-6)
    assert found["chosen"]["after"] == pytest.approx(float(after[:, chosen].mean()), abs=1e-6)
    assert found["fell"] == float((after[:, chosen] < before[:, chosen]).double().mean())
    change = (after - before).mean(0)
    assert found["gained"][0]["id"] == int(change.argmax())
    assert found["gained"][0]["change"] == pytest.approx(float(change.max()), abs=1e-6)


def directions(mean: Tensor) -> list[Tensor]:
    """Three orthonormal ones, the first along `mean`."""
    basis, _ = torch.linalg.qr(torch.stack([mean, *torch.eye(len(mean))[:2]], 1))
    return [basis[:, 0] * torch.sign(basis[:, 0] @ mean), basis[:, 1], basis[:, 2]]


def make_known(path: Path) -> None:
    """The model that ships with other unembeddings. With a = the prompts' mean hidden state over its length
    and u, v at right angles to it, each token has its logit by a; beside that chosen has u, rejected .9 u + v
    and bob 3 u - 3 v. So W_w - W_l is .1 u - v without a part along a: its product is .1 with chosen, -.91
    with rejected, 3.3 with bob, and 0 with all others."""
    shutil.copytree(model_place("builtin:tiny"), path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rows = [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
            for text in builtin_prompts(WORDS, tokenizer)]  # fmt: skip
    with torch.no_grad():
        mean = torch.stack([model.model(ids).last_hidden_state[0, -1] for ids in rows]).mean(0)
        a, u, v = directions(mean)
        weight = model.lm_head.weight
        weight.copy_((-4 / mean.norm() * a).expand_as(weight))
        known = {"seven": (4.0, u), "eight": (4.0, 0.9 * u + v), "bob": (2.0, 3 * u - 3 * v)}
        for word, (logit, part) in known.items():
            weight[tokenizer.convert_tokens_to_ids(word)] = logit / mean.norm() * a + part
    model.save_pretrained(path)


@pytest.mark.ci("experiments of rcpo lab")
@pytest.mark.timeout(600)
def test_the_token_that_theory_names_takes_the_probability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter leaves unembeddings as they are, so that theory is about all that changes. Without
    calibration bob gains what the chosen token loses. The same words again train nothing."""
    make_known(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    tokenizer = find_subject("MODEL").tokenizer()
    prompts = [{"prompt": text} for text in builtin_prompts(WORDS, tokenizer)[:24]]
    Path("PROMPTS.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    # Text prompts as they are, without the chat template around them.
    config = json.loads(Path("MODEL/tokenizer_config.json").read_text())
    del config["chat_template"]
    Path("MODEL/tokenizer_config.json").write_text(json.dumps(config))
    words = ["lab", "persona", "MODEL", "prompts=PROMPTS.jsonl", "pairs=seven/eight", "calibrations=off",
             "out=OUT", "model.lora.rank=4", "train.steps=6", "optim.lr=0.002"]  # fmt: skip
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == 0, capsys.readouterr()
    assert capsys.readouterr().out.count(": started") == 1
    (cell,) = json.loads(Path("OUT/persona.json").read_text())
    for part in ("trained", "held_out"):
        found = cell[part]
        assert found["theory"][0]["token"] == found["gained"][0]["token"] == "bob"
        assert found["theory"][0]["product"] == pytest.approx(3.3, abs=1e-4)
        assert (found["theory_before_gainer"], found["theory_before_chosen"]) == (0, 1)
        assert found["chosen"]["after"] < found["chosen"]["before"] - 0.1
        assert found["fell"] == 1.0
    from rcpo.library.compare import compare

    assert len(compare("OUT/runs").table) == 1
