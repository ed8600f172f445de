"""Which model gives the reference, how long it is held, what the run folder keeps, and what is refused."""

import gc
import logging
import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import rcpo.training.loop
from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.forked import in_a_fork
from helpers.rank_runs import train_here
from helpers.same_run import final_weights, metrics
from helpers.selection import matrix
from helpers.tiny_models import make_llama, make_neox
from rcpo.common.errors import StoppedError, UserError
from rcpo.config.schema import Config
from rcpo.launch.changes import changed_config
from rcpo.models.load import load_tokenizer
from rcpo.ranks.stopping import TimeLeft
from rcpo.reference import parts
from rcpo.reference.weights import check_reference, has_own_weights
from rcpo.runs.folder import RunFolder
from rcpo.training.read_inputs import read_inputs

CASE = Case("dpo", "off", "llama", "adamw")
SHORT = ("train.steps=2", "train.pairs_per_step=4", "train.eval_every=0")
LORA = "model.lora.rank=2"
LIVE = "reference=live"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    make_neox(seed=3).save_pretrained(folder / "other")
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(folder / "other")
    return folder


def config_of(inputs: Path, place: Path, *words: str, case: Case = CASE, stage: int = 0) -> Config:
    own = [f"reference.path={inputs / 'other'}" if word == "own" else word for word in words]
    return make_config(inputs, place, case, Layout(1, 2, stage), *SHORT, *own)


def weights_held(run: RunFolder) -> tuple[list[int], int]:
    """Train, and look around when the policy is about to take its first step: the numbers of each model that
    is in memory, the policy's first, and the bytes that the reference says it holds."""
    seen: list[weakref.ref[PreTrainedModel]] = []
    load, rehearse = PreTrainedModel.__init__, rcpo.training.loop.rehearse
    found: list[tuple[list[int], int]] = []

    def remember(model: PreTrainedModel, *args: object, **kwargs: object) -> None:
        load(model, *args, **kwargs)  # type: ignore[arg-type]
        seen.append(weakref.ref(model))

    def look(*args: object) -> None:
        gc.collect()
        engine, reference = args[2].engine, args[5]  # type: ignore[attr-defined]
        alive = [model for each in seen if (model := each()) is not None and not _is_part(model)]
        alive.sort(key=lambda model: model is not engine.policy.model)
        sizes = [sum(_num_kept(parameter) for parameter in model.parameters()) for model in alive]
        found.append(([size for size in sizes if size], reference.num_bytes))  # type: ignore[attr-defined]
        rehearse(*args)  # type: ignore[arg-type]

    PreTrainedModel.__init__ = remember  # type: ignore[method-assign]
    rcpo.training.loop.rehearse = look  # type: ignore[assignment]
    train_here(run)
    return found[0]


def _is_part(model: PreTrainedModel) -> bool:
    """Whether it is the body of another one: only a whole model has a head."""
    return model.get_output_embeddings() is None


def _num_kept(parameter: torch.nn.Parameter) -> int:
    """Numbers in memory: at ZeRO 3 those of the shard, and of what stays gathered beside it."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.numel()
    assert parameter.untyped_storage().nbytes() in (0, 4 * parameter.numel())
    return int(shard.numel())


def numel(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


HELD = [(("own",), (), 0), (("own",), (), 3), ((LIVE,), ("llama",), 0), ((LIVE, "own"), ("other",), 3),
        ((LIVE, LORA), (), 2), ((LORA, LIVE, "own"), ("other",), 1)]  # fmt: skip
"""Words, the models that are held beside the policy, and the ZeRO stage."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("words", "others", "stage"),
    matrix(HELD, HELD[1:4:2].__contains__, "references in memory"),
    ids=["cached-own-0", "cached-own-3", "live-0", "live-own-3", "live-lora-2", "live-lora-own-1"],
)
def test_only_a_live_reference_stays_in_memory(
    inputs: Path, tmp_path: Path, words: tuple[str, ...], others: tuple[str, ...], stage: int
) -> None:
    """Of the model that a cached reference.path names nothing is left when the policy starts; a live one is
    there whole (one rank), and says its 4 bytes a parameter; with an adapter there is no second model."""
    run = make_run(config_of(inputs, tmp_path / "run", *words, stage=stage))
    size = {"llama": numel(make_llama()), "other": numel(make_neox())}

    def work() -> None:
        held, num_bytes = weights_held(run)
        assert held[1:] == [size[name] for name in others]
        assert num_bytes == 4 * sum(held[1:])

    in_a_fork(work)
    assert len(metrics(run)) == 2


@pytest.mark.timeout(60)
@pytest.mark.parametrize("more", [("own",), (LORA,)], ids=["own", "lora"])
def test_live_reads_and_writes_no_cache(inputs: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    run = make_run(config_of(inputs, tmp_path / "run", LIVE, *more))
    in_a_fork(lambda: train_here(run))
    assert len(metrics(run)) == 2
    assert not (Path(os.environ["RCPO_CACHE"]) / "reference").exists()


def stop_after(run: RunFolder, step: int) -> None:
    """Train up to a step whose checkpoint is the last thing written."""
    save_or_go_on = rcpo.training.loop.save_or_go_on

    def save_and_stop(training: rcpo.training.state.Training, time_left: TimeLeft) -> None:
        save_or_go_on(training, time_left)
        if training.state.step == step:
            raise StoppedError("here")

    rcpo.training.loop.save_or_go_on = save_and_stop  # type: ignore[assignment]
    with pytest.raises(StoppedError):
        train_here(run)


@pytest.mark.ci("killed reference passes")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_reference_pass_goes_on(
    inputs: Path,
    tmp_path: Path,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Killed when its first part is written: the next start says how much is here, runs the rest, and
    writes the table of a run that was never killed; then no part is left."""
    word = f"model.dtype={dtype}"
    whole, cut = (make_run(config_of(inputs, tmp_path / name, word)) for name in ("whole", "cut"))

    def kill_after_first(own: parts.Parts, rows: list[parts.Row]) -> None:
        add(own, rows)
        os._exit(9)

    add = parts.Parts.add
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    in_a_fork(lambda: train_here(whole))
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(parts.Parts, "add", kill_after_first)
    with pytest.raises(AssertionError):
        in_a_fork(lambda: train_here(cut))
    monkeypatch.setattr(parts.Parts, "add", add)
    capfd.readouterr()
    in_a_fork(lambda: train_here(cut))
    assert re.search(r"reference: (\d+) of (\d+) pairs were here", capfd.readouterr().out)
    mine, theirs = load_file(cut.reference), load_file(whole.reference)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].nan_to_num(), values.nan_to_num()) for name, values in theirs.items())
    assert not list((tmp_path / "another" / "reference").glob("*.parts"))
    assert metrics(cut) == metrics(whole)


KINDS = {
    "cached-own": ("own",),
    "live-own": (LIVE, "own"),
    "live-lora": (LIVE, LORA),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
def test_resumed_is_never_stopped(inputs: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """Bit for bit, though the reference is loaded anew, and after the policy has moved away from it."""
    whole, cut = (
        make_run(config_of(inputs, tmp_path / name, *words, "train.save_every=1", stage=2))
        for name in ("whole", "cut")
    )
    in_a_fork(lambda: train_here(whole))
    in_a_fork(lambda: stop_after(cut, 1))
    in_a_fork(lambda: train_here(cut, resume=True))
    assert metrics(cut) == metrics(whole)
    assert cut.rows(cut.eval) == whole.rows(whole.eval)
    expected = final_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(cut).items())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "words", [(LIVE, "own"), ("own", "train.steps=3")], ids=["live", "cached-and-longer"]
)
def test_other_weights_at_the_reference_path_do_not_resume(
    inputs: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Somebody has trained the SFT model on. Where the run folder has every row, they are not read."""
    place = tmp_path / "reference"
    make_neox(seed=3).save_pretrained(place)
    AutoTokenizer.from_pretrained(inputs / "llama").save_pretrained(place)
    own = [f"reference.path={place}" if word == "own" else word for word in words]
    run = make_run(config_of(inputs, tmp_path / "run", *own, "train.save_every=1", "train.steps=2"))
    in_a_fork(lambda: stop_after(run, 1))
    make_neox(seed=4).save_pretrained(place)

    def work() -> None:
        if LIVE not in words:
            changed_config(run, ["train.steps=7"], None).write(run)
        with pytest.raises(UserError, match=r"^reference: the weights in \S+reference are not those that"):
            train_here(run, resume=True)

    in_a_fork(work)


@pytest.mark.parametrize("word", ["reference.name=live", "reference.path=x", "reference.pairs_per_device=2"])
def test_a_resumed_run_keeps_its_reference(inputs: Path, tmp_path: Path, word: str) -> None:
    """Neither by --allow-change nor in config.yaml."""
    run = make_run(config_of(inputs, tmp_path / "run"))
    key, _, value = word.partition("=")
    with pytest.raises(UserError, match=rf"^--allow-change {word}: {key} decides what is trained"):
        changed_config(run, [word], None)
    tree = yaml.safe_load(run.config.read_text())
    tree["reference"][key.partition(".")[2]] = yaml.safe_load(value)
    run.config.write_text(yaml.safe_dump(tree))
    with pytest.raises(
        UserError, match=rf"^{key}: the run was started with \S+, not {value}, and it decides"
    ):
        changed_config(run, [], None)


def other_words(folder: Path) -> None:
    """The same words with ids one further on."""
    make_llama().save_pretrained(folder)
    names = ["<pad>", "<s>", "</s>", "new", *(f"w{idx}" for idx in range(3, 36))]
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({name: idx for idx, name in enumerate(names)}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)


def no_weights(folder: Path) -> None:
    make_llama().save_pretrained(folder)
    (folder / "model.safetensors").unlink()


def no_words(folder: Path) -> None:
    make_llama().save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (other_words, r"has another tokenizer than model\.path=\S+ \('w3' is 4 there and 3 here\)"),
        (no_weights, r"has no \*\.safetensors weights"),
        (no_words, r"the tokenizer cannot be loaded"),
        (lambda folder: None, r"no such folder"),
    ],
    ids=["other words", "no weights", "no tokenizer", "no folder"],
)
def test_a_reference_that_cannot_be_is_one_line(
    inputs: Path, tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    config = config_of(inputs, tmp_path / "run", f"reference.path={tmp_path / 'reference'}")
    make(tmp_path / "reference")
    with pytest.raises(UserError, match=rf"^reference\.path=\S+: {said}[^\n]*$"):
        read_inputs(config)


def test_rows_longer_than_the_references_positions_are_refused(inputs: Path, tmp_path: Path) -> None:
    config = config_of(inputs, tmp_path / "run", "own")
    check_reference(config, load_tokenizer(config.model), 64)
    with pytest.raises(UserError, match=r"the longest row has 65 tokens, reference\.path=\S+ takes 64"):
        check_reference(config, load_tokenizer(config.model), 65)


def test_a_longer_vocabulary_is_the_same_words(inputs: Path, tmp_path: Path) -> None:
    """Words that the policy's tokenizer lacks never come up."""
    make_llama().save_pretrained(tmp_path / "reference")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "llama")
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "reference")
    config = config_of(inputs, tmp_path / "run", f"reference.path={tmp_path / 'reference'}")
    check_reference(config, load_tokenizer(config.model), 20)


def test_feedback_steers_by_displacement_alone(inputs: Path, tmp_path: Path) -> None:
    """Training batches are measured against reference.path; so the probe, or an objective that needs none."""
    feedback = Case("dpo", "feedback", "llama", "adamw")
    with pytest.raises(UserError, match=r"^calibration\.feedback\.source=batch: would steer by the distance"):
        config_of(inputs, tmp_path / "run", "own", case=feedback)
    assert has_own_weights(
        config_of(inputs, tmp_path / "run", "own", "calibration.feedback.source=probe", case=feedback)
    )
    free = Case("simpo", "feedback", "llama", "adamw")
    assert not has_own_weights(config_of(inputs, tmp_path / "run", "own", case=free))


@pytest.mark.timeout(60)
def test_a_path_that_no_objective_reads_is_said(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """simpo: displacement is measured against the initial policy, and the run is that without the path."""
    case = Case("simpo", "off", "llama", "adamw")
    told, plain = (
        make_run(config_of(inputs, tmp_path / name, *words, case=case))
        for name, words in (("told", ("own",)), ("plain", ()))
    )

    def work() -> None:
        with caplog.at_level(logging.WARNING):
            train_here(told)
        assert "objective=simpo needs no reference, so it is not read" in caplog.text

    in_a_fork(work)
    in_a_fork(lambda: train_here(plain))
    assert metrics(told) == metrics(plain)
