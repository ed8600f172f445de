"""A reference that follows the policy (reference.sync_every): against the same loop in plain torch, on one
rank and on two at ZeRO 3, with a cached and a live reference of the start; killed and resumed; refusals. BEMA
by hand and against TRL's."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers.cases import Case, Layout, make_config, make_run, write_inputs
from helpers.plain_loop import summed
from helpers.rank_runs import Job, do_jobs
from helpers.same_run import final_weights, metrics
from helpers.selection import asked_for, matrix
from helpers.tiny_models import make_llama
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.reference.bema import Bema
from rcpo.runs.folder import RunFolder
from rcpo.training.checkpoint import complete_checkpoints
from rcpo.training.read_inputs import read_inputs

CASE = Case("dpo", "off", "llama", "sgd")
WORDS = ("reference.sync_every=2", "train.grad_clip=0", "optim.lr=0.05")
LIVE, SAVES, BEMA = "reference=live", "train.save_every=3", "reference.sync_how=bema"
MIX = "reference.sync_mix=0.4"
LAYOUTS = {
    "one": (Layout(1, 4, 1), (SAVES,)),
    "live": (Layout(1, 8, 0), (LIVE,)),
    "two": (Layout(2, 2, 3), (SAVES,)),
    "bema": (Layout(1, 4, 1), (SAVES, BEMA)),
    "bema-two": (Layout(2, 2, 3), (SAVES, BEMA)),
}


ALWAYS = ("one",)


def words_of(words: tuple[str, ...]) -> tuple[str, ...]:
    return (*WORDS, *words) if BEMA in words else (*WORDS, MIX, *words)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """By name, those that are asked for; killed: when the row of step 5 was written, and resumed from the
    checkpoint of step 3."""
    asked = {params["name"] for params in asked_for(request) if "name" in params}
    inputs, folder = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("runs")
    write_inputs(inputs)
    made, jobs = {}, {1: [], 2: []}
    for name, (layout, words) in LAYOUTS.items():
        if name not in asked:
            continue
        for killed in (False, True) if SAVES in words else (False,):
            key = f"{name}-killed" if killed else name
            made[key] = make_run(make_config(inputs, folder / key, CASE, layout, *words_of(words)))
            path = str(made[key].path)
            if killed:
                jobs[layout.ranks] += [Job(path, killed_at=("row", 5)), Job(path, resume=True)]
            else:
                jobs[layout.ranks] += [Job(path)]
    for num_ranks in (1, 2):
        if jobs[num_ranks]:
            do_jobs(jobs[num_ranks], num_ranks, 400)
    made["inputs"] = RunFolder(str(inputs))
    return made


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", matrix(LAYOUTS, ALWAYS.__contains__, "rows of matrices"))
def test_it_is_the_plain_loop(name: str, runs: dict[str, RunFolder], tmp_path: Path) -> None:
    """Six steps: loss by the reference of the moment, displacement against the weights of the start, and the
    loss of the held-out pairs by the reference of the moment too."""
    layout, words = LAYOUTS[name]
    config = make_config(runs["inputs"].path, tmp_path / "run", CASE, layout, *words_of(words))
    inputs = read_inputs(config)
    sampler = inputs.sampler(config)
    policy, start, moving, average = (make_llama() for _ in range(4))
    rows = metrics(runs[name])
    evals = {row["step"]: row for row in runs[name].rows(runs[name].eval)}
    for step in range(6):
        pairs = [inputs.train[idx] for idx in sampler.global_batch(step)]
        z, then = summed(policy, pairs), summed(start, pairs)
        with torch.no_grad():
            ref = summed(moving, pairs)
        loss = -F.logsigmoid(0.1 * (z.z_w - ref.z_w - z.z_l + ref.z_l)).mean()
        assert rows[step]["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        moved = (z.z_w - then.z_w).detach().mean()
        assert rows[step]["displacement/chosen"] == pytest.approx(float(moved), abs=1e-4)
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        with torch.no_grad():
            for weight, gradient in zip(policy.parameters(), gradients, strict=True):
                weight -= 0.05 * gradient
            if (step + 1) % 2 == 0:
                models = (moving, policy, average, start)
                for own, its, ema, first in zip(*(each.parameters() for each in models), strict=True):
                    beta, alpha = (12 + step - 1) ** -0.5, (12 + step - 1) ** -0.2
                    ema.copy_((1 - beta) * ema + beta * its)
                    own.copy_(ema + alpha * (its - first) if BEMA in words else 0.6 * own + 0.4 * its)
            if step + 1 in (4, 6):
                z, ref = summed(policy, inputs.held_out), summed(moving, inputs.held_out)
                held_out = -F.logsigmoid(0.1 * (z.z_w - ref.z_w - z.z_l + ref.z_l)).mean()
                assert evals[step + 1]["loss"] == pytest.approx(float(held_out), rel=1e-4)
    weights = final_weights(runs[name])
    for key, weight in policy.state_dict().items():
        torch.testing.assert_close(weights[key], weight, atol=1e-5, rtol=0, msg=key)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", matrix(["one", "two", "bema", "bema-two"], ALWAYS.__contains__, "kills and resumes")
)
def test_killed_and_resumed_is_never_killed(name: str, runs: dict[str, RunFolder]) -> None:
    """Bit for bit: the checkpoint of step 3 has the reference of step 2."""
    whole, resumed = runs[name], runs[f"{name}-killed"]
    assert metrics(resumed) == metrics(whole)
    assert resumed.eval.read_bytes() == whole.eval.read_bytes()
    expected = final_weights(whole)
    assert all(torch.equal(weight, expected[key]) for key, weight in final_weights(resumed).items())
    assert all((path / "reference.safetensors").is_file() for path in complete_checkpoints(whole))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["objective=simpo"], "objective=simpo reads no reference"),
        (["objective=ti_dpo"], "objective=ti_dpo weighs tokens by log-ratios to the reference of the start"),
        (["reference.path=other"], "reference.path=other is another model, and no policy of this run"),
        (
            ["model.lora.rank=4"],
            "with model.lora.rank the reference is the policy without its adapter, whose weights stay",
        ),
    ],
)
def test_what_cannot_follow_is_refused(words: list[str], why: str) -> None:
    tree = compose(["reference.sync_every=4", *words])
    assert tree is not None
    with pytest.raises(UserError) as caught:
        validate(tree)
    assert str(caught.value) == f"reference.sync_every=4: {why}; type reference.sync_every=0"


def test_bad_values_are_one_line() -> None:
    for word, line in (
        (
            "reference.sync_mix=0.5",
            r"^reference\.sync_mix=0\.5: has no effect without .*; type ",
        ),
        (
            "reference.sync_how=bema",
            r"^reference\.sync_how=bema: has no effect without reference\.sync_every; type ",
        ),
        ("reference.bema_lag=0", r"^reference\.bema_lag=0: .*; type "),
        ("reference.bema_power=-1", r"^reference\.bema_power=-1: .*; type "),
        ("reference.sync_how=ema", r"^reference\.sync_how=ema: .*; type "),
        ("reference.sync_mix=0", r"^reference\.sync_mix=0: .*; type "),
        ("reference.sync_every=-1", r"^reference\.sync_every=-1: .*; type "),
        (
            "reference.sync_every=4 reference.bema_bias=1",
            r"^reference\.bema_bias=1\.0: has no effect without reference\.sync_how=bema; type ",
        ),
        (
            "reference.sync_every=4 reference.sync_how=bema reference.sync_mix=0.5",
            r"^reference\.sync_mix=0\.5: has no effect without reference\.sync_how=mix; type ",
        ),
    ):
        tree = compose(word.split())
        assert tree is not None
        with pytest.raises(UserError, match=line):
            validate(tree)


def test_bema_by_hand() -> None:
    """lag 2, power 1/2, bias 1, from 0. Step 2, at 1: age 4, beta 1/2, alpha 1/4: EMA .5, and .5 + .25. Step
    14, at 2: age 16, beta 1/4, alpha 1/16: EMA .5 + 1.5/4 = .875, and .875 + 2/16."""
    bema = Bema(power=0.5, bias=1.0, lag=2.0)
    bema.begin("w", torch.zeros(1))
    assert bema.take("w", torch.ones(1), 2).tolist() == [0.75]
    assert bema.take("w", 2 * torch.ones(1), 14).tolist() == [1.0]
    assert bema.ema["w"].tolist() == [0.875]


@pytest.mark.ci("TRL's callback", needs="trl")
def test_bema_is_trl_s(tmp_path: Path) -> None:
    """Ten steps, every other one taken in: the weights that TRL's BEMACallback makes of the same policy, at
    its defaults."""
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from trl import BEMACallback

    policy = make_llama()
    tree = compose([])
    assert tree is not None
    shipped = validate(tree).reference
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    theirs, state, control = BEMACallback(update_freq=2), TrainerState(), TrainerControl()
    theirs.on_train_begin(args, state, control, model=policy)
    ours = Bema(shipped.bema_power, shipped.bema_bias, shipped.bema_lag)
    for name, weight in policy.named_parameters():
        ours.begin(name, weight)
    torch.manual_seed(0)
    for step in range(1, 11):
        state.global_step = step
        with torch.no_grad():
            for weight in policy.parameters():
                weight += 0.05 * torch.randn_like(weight)
        theirs.on_step_end(args, state, control, model=policy)
        if step % 2 == 0:
            for name, weight in policy.named_parameters():
                expected = dict(theirs.running_model.named_parameters())[name]
                torch.testing.assert_close(ours.take(name, weight, step), expected, atol=1e-6, rtol=1e-6)
