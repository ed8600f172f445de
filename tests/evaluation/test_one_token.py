"""The one-token experiment: what theory names by hand, words of one token, and trainings of a model whose
unembeddings are set so that the token that gains is known."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rcpo import cli
from rcpo.commands.lab_persona import _means
from rcpo.common.errors import UserError
from rcpo.data.pairs import SideLogProbs
from rcpo.evaluation import one_token_course as course
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
from rcpo.runs.folder import RunFolder
from rcpo.runs.rows import encode_row

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


def test_the_largest_fall_is_during_training(tmp_path: Path) -> None:
    """One prompt: .5, .25, .125 before the updates of steps 1, 2, 4 (a number of step 3 was lost), .4 at the
    end. Two held-out prompts: means .5, (.1 + .3) / 2, (.6 + .2) / 2, (.2 + .4) / 2. Of two that are
    the same the first counts."""
    run = RunFolder(tmp_path)
    run.pair_results.mkdir()
    before = {1: 0.5, 2: 0.25, 3: math.nan, 4: 0.125}
    rows = ({"step": step, "logps/chosen": math.log(p)} for step, p in before.items())
    run.metrics.write_text("".join(encode_row(row) + "\n" for row in rows))
    held_out = {0: (0.5, 0.5), 2: (0.1, 0.3), 3: (0.6, 0.2), 4: (0.2, 0.4)}
    run.eval.write_text("".join(encode_row({"step": step}) + "\n" for step in held_out))
    for step, p in held_out.items():
        run.save_pair_results(step, SideLogProbs(torch.tensor(p).log(), torch.zeros(2)))
    trained = course.summary(course.of_one_prompt(run, 0.4))
    assert [each["step"] for each in trained["course"]] == [0, 1, 3, 4]
    assert [each["p"] for each in trained["course"]] == pytest.approx([0.5, 0.25, 0.125, 0.4])
    assert trained["lowest"] == {"p": pytest.approx(0.125), "step": 3}
    assert 4 not in course.of_one_prompt(run, None)
    of_held_out = course.summary(course.of_held_out(run))
    assert [each["p"] for each in of_held_out["course"]] == pytest.approx([0.5, 0.2, 0.4, 0.3])
    assert of_held_out["lowest"] == {"p": pytest.approx(0.2), "step": 2}
    assert course.summary({0: 0.5, 4: 0.25, 2: 0.25})["lowest"]["step"] == 2


def test_prompts_that_are_trained_alone_have_a_mean() -> None:
    """p(chosen) .9 -> .3 and .7 -> .8, p(rejected) .1 -> .5 and .3 -> .1; smallest .2 at step 4 and .6 at
    step 1; the first fell."""
    prompts = [
        {"chosen": {"before": 0.9, "after": 0.3}, "rejected": {"before": 0.1, "after": 0.5},
         "lowest": {"p": 0.2, "step": 4}, "fell": 1.0},
        {"chosen": {"before": 0.7, "after": 0.8}, "rejected": {"before": 0.3, "after": 0.1},
         "lowest": {"p": 0.6, "step": 1}, "fell": 0.0},
    ]  # fmt: skip
    found = course.mean_of(prompts)
    assert found["chosen"] == pytest.approx({"before": 0.8, "after": 0.55})
    assert found["rejected"] == pytest.approx({"before": 0.2, "after": 0.3})
    assert found["lowest"] == {"p": pytest.approx(0.4), "step": "1 to 4"}
    assert found["fell"] == 0.5
    axes = {"objective": "dpo", "calibration": "off", "seed": 0}
    cells = [
        axes | {"pair": f"{label}-{number}", "trained": each}
        for label in ("yes-no", "no-never")
        for number, each in enumerate(prompts)
    ]
    assert [each["pair"] for each in _means(cells)] == ["yes-no, mean of 2", "no-never, mean of 2"]
    assert _means(cells)[0]["trained"] == found
    assert _means(cells[:1]) == []


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


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the known MODEL, without a chat template, and PROMPTS.jsonl."""
    make_known(tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    tokenizer = find_subject("MODEL").tokenizer()
    prompts = [{"prompt": text} for text in builtin_prompts(WORDS, tokenizer)[:24]]
    Path("PROMPTS.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = json.loads(Path("MODEL/tokenizer_config.json").read_text())
    del config["chat_template"]
    Path("MODEL/tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def run_lab(*words: str) -> list[dict[str, Any]]:
    given = ("MODEL", "prompts=PROMPTS.jsonl", "pairs=seven/eight", "calibrations=off", "out=OUT")
    with pytest.raises(SystemExit) as stop:
        cli.main(["lab", "persona", *given, *words])
    assert stop.value.code == 0
    found: list[dict[str, Any]] = json.loads(Path("OUT/persona.json").read_text())
    return found


@pytest.mark.ci("experiments of rcpo lab")
@pytest.mark.timeout(600)
def test_the_token_that_theory_names_takes_the_probability(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter leaves unembeddings as they are, so that theory is about all that changes. Without
    calibration bob gains what the chosen token loses. The same words again train nothing."""
    for _ in range(2):
        (cell,) = run_lab("model.lora.rank=4", "train.steps=6", "train.eval_every=2", "optim.lr=0.002")
    assert capsys.readouterr().out.count(": started") == 1
    for part in ("trained", "held_out"):
        found = cell[part]
        assert found["theory"][0]["token"] == found["gained"][0]["token"] == "bob"
        assert found["theory"][0]["product"] == pytest.approx(3.3, abs=1e-4)
        assert (found["theory_before_gainer"], found["theory_before_chosen"]) == (0, 1)
        assert found["chosen"]["after"] < found["chosen"]["before"] - 0.1
        assert found["fell"] == 1.0
    course = {each["step"]: each["p"] for each in cell["held_out"]["course"]}
    assert list(course) == [0, 2, 4, 6]
    ends = [cell["held_out"]["chosen"][when] for when in ("before", "after")]
    assert [course[0], course[6]] == pytest.approx(ends, abs=1e-5)
    assert "course" not in cell["trained"]
    from rcpo.library.compare import compare

    assert len(compare("OUT/runs").table) == 1


@pytest.mark.ci("experiments of rcpo lab")
@pytest.mark.timeout(600)
def test_a_fall_that_has_recovered_by_the_end_is_seen(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt by itself, all weights trained: bob takes the probability in the first step, and the chosen
    token has it back in the second. Checked against the softmax of every step's checkpoint."""
    steps = ("train.steps=3", "train.save_every=1", "train.keep_last=3", "train.eval_every=3")
    (cell,) = run_lab("alone=1", "optim.lr=0.005", "data.eval_pairs=2", *steps)
    found = cell["trained"]
    assert found["lowest"]["step"] == 1
    assert found["lowest"]["p"] < found["chosen"]["before"] - 0.2 < found["chosen"]["after"] - 0.2
    (run,) = Path("OUT/runs/cells").iterdir()
    tokenizer = find_subject("MODEL").tokenizer()
    prompt = json.loads(Path("PROMPTS.jsonl").read_text().splitlines()[0])["prompt"]
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    seven = tokenizer.convert_tokens_to_ids("seven")
    with torch.no_grad():
        said = [
            float(find_subject(str(run), str(step)).load()(ids).logits[0, -1].softmax(-1)[seven])
            for step in range(4)
        ]
    assert [each["step"] for each in found["course"]] == [0, 1, 2, 3]
    assert [each["p"] for each in found["course"]] == pytest.approx(said, abs=1e-5)
    assert f"{said[1]:.3f} |       1 |" in capsys.readouterr().out
