"""Runs with adapters on what sees: micro-batches, ranks and stages, resumed to the bit, and what is saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from helpers.cases import Case, Layout, make_config, make_run
from helpers.rank_runs import Job, do_jobs, train_all
from helpers.same_run import assert_equal_rows, metrics
from helpers.tiny_vision import PLACES, make_vision, picture, rows_with_images
from rcpo.cli import dispatch
from rcpo.config.schema import ModelConfig
from rcpo.data.batch import collate
from rcpo.data.pictures import sight_of
from rcpo.library.run import Run
from rcpo.models.load import load_model, load_tokenizer
from rcpo.models.policy import Policy
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.read_inputs import read_inputs

pytestmark = [pytest.mark.ci("trainings with images"), pytest.mark.timeout(300)]
WORDS = (
    "model.vision=lora", "model.lora.rank=2", "model.lora.save=adapter", "calibration.scope=full",
    "train.max_length=256", "train.steps=4", "train.save_every=2", "train.eval_every=2", "optim.eps=1e-2",
    "optim.lr=0.05",
)  # fmt: skip
WHOLE, SPLIT = Layout(1, 4), Layout(2, 1, 2)
"""One rank with two micro-batches a step, and two ranks with four of one pair at ZeRO 2: some without an
image."""


def write_inputs(folder: Path, family: str) -> Path:
    make_vision(folder / "model", family)
    rows = rows_with_images(folder, 26, (1, 0, 2, 1, 0))
    for name, some in (("train", rows[:20]), ("held-out", rows[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("llava"), "llava")


def run_of(inputs: Path, name: str, layout: Layout, *words: str) -> RunFolder:
    case = Case("dpo", "exact", "model", "adamw")
    return make_run(make_config(inputs, inputs / name, case, layout, *WORDS, *words))


def adapter(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.final / "adapter_model.safetensors")


def answers(model: PreTrainedModel, folder: Path) -> torch.Tensor:
    """Logits of a prompt with two images, from which the model also writes some tokens."""
    sight = sight_of(load_tokenizer(ModelConfig(path=str(folder))))
    assert sight is not None
    place = PLACES.get(model.config.model_type, "<image>")
    inputs = sight.processor(
        images=[picture(1), picture(2)], text=[f"<s> <|user|> {place} {place} what is it <|assistant|>"],
        return_tensors="pt", add_special_tokens=False,
    )  # fmt: skip
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert written.shape[1] > inputs["input_ids"].shape[1]
        return model(**inputs).logits


@pytest.mark.parametrize(("family", "stage"), [("llava", 2), ("qwen2_5_vl", 3)])
def test_micro_batches_ranks_and_stages_do_not_matter(family: str, stage: int, tmp_path: Path) -> None:
    """Every number of every row and evaluation, and adapters to 1e-5; all of them move, of tower and
    projector too."""
    inputs = write_inputs(tmp_path, family)
    first, other = run_of(inputs, "whole", WHOLE), run_of(inputs, "split", Layout(2, 1, stage))
    train_all([first], 1, 120)
    train_all([other], 2, 120)
    expected = adapter(first)
    assert not [name for name, each in expected.items() if "lora_B" in name and each.abs().max() < 1e-4]
    assert any("vision" in name or "visual" in name for name in expected)
    assert_equal_rows(metrics(first), metrics(other))
    assert_equal_rows(first.rows(first.eval), other.rows(other.eval))
    for name, weight in adapter(other).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)


def test_scope_full_is_every_adapter(inputs: Path) -> None:
    """|v_w| and |v_l| of step 1 with the estimator mean: those of the mean of z over the batch, by plain
    torch, over all that trains."""
    run = run_of(inputs, "scope", WHOLE, "train.steps=1", "calibration.estimator=mean")
    train_all([run], 1, 120)
    _, config = open_run(str(run.path))
    read = read_inputs(config)
    model = load_model(config.model)
    trained = {
        name.replace(".default.", "."): each for name, each in model.named_parameters() if each.requires_grad
    }
    start = adapter(run)  # of A: B is 0 in step 1, so that A has no gradient yet
    for name, each in trained.items():
        if "lora_A" in name:
            each.data.copy_(start[f"base_model.model.{name}"])
    pairs = [read.train[idx] for idx in read.sampler(config).global_batch(0)]
    z = Policy(model)(collate(pairs, 0)).view(2, -1).mean(1)
    for key, side in zip(("score/chosen_norm", "score/rejected_norm"), z, strict=True):
        gradient = torch.autograd.grad(side, list(trained.values()), retain_graph=True)
        norm = torch.cat([each.flatten() for each in gradient]).norm()
        assert metrics(run)[0][key] == pytest.approx(float(norm), rel=1e-3)


def test_killed_and_resumed_equals_never_killed(inputs: Path) -> None:
    whole, killed = run_of(inputs, "never", SPLIT), run_of(inputs, "killed", SPLIT)
    path = str(killed.path)
    do_jobs([Job(str(whole.path)), Job(path, killed_at=("row", 3)), Job(path, resume=True)], 2, 120)
    assert repr(metrics(killed)) == repr(metrics(whole))
    assert killed.eval.read_bytes() == whole.eval.read_bytes()
    expected = adapter(whole)
    for name, weight in adapter(killed).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_adapter_is_its_base_and_merges_into_one_model(family: str, tmp_path: Path) -> None:
    """final/ as transformers loads it, peft's own adapter on the base, `rcpo export --merge`, and a run that
    saved a merged model: the same logits of a prompt with images, and words written from it."""
    from peft import PeftModel

    inputs = write_inputs(tmp_path, family)
    run = run_of(inputs, "saved", WHOLE, "train.steps=2")
    merged_at_once = run_of(inputs, "merged", WHOLE, "train.steps=2", "model.lora.save=merged")
    train_all([run, merged_at_once], 1, 120)
    assert dispatch(["export", str(run.path), str(tmp_path / "out"), "--merge"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card
    assert "merged into these weights" in card
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    base = AutoModelForImageTextToText.from_pretrained(inputs / "model").eval()
    out = tmp_path / "out"
    before = answers(base, out)
    adapted = PeftModel.from_pretrained(base, run.final).eval()
    expected = answers(adapted, out)
    assert (before - expected).abs().max() > 1e-3
    for model in (
        merged,
        AutoModelForImageTextToText.from_pretrained(run.final),
        Run(run.path).model(),
        AutoModelForImageTextToText.from_pretrained(merged_at_once.final),
    ):
        assert (answers(model.eval(), out) - expected).abs().max() < 1e-4
    if family == "llava":  # of Qwen's, transformers builds no processor without torchvision
        for folder in (out, run.final):
            AutoProcessor.from_pretrained(folder, backend="pil")
