"""`rcpo.Calibrator` in a loop that is not rcpo's: alpha and weights of the plain loop, however the batch is
split, over two ranks with DDP too; its state, and what it refuses."""

import copy
import math
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import rcpo
from helpers.plain_loop import Settings, Steering, summed, train_plainly
from helpers.tiny_models import MODELS, make_pairs
from rcpo.data.tokenize import TokenizedPair
from rcpo.objectives import load_objective

BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1], [2, 3, 4, 5], [6, 7, 8, 9], [0, 2, 4, 6]]
PAIRS = make_pairs(10, seed=3)
PROBE = make_pairs(4, seed=7)
LR = 0.02
PARAMS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1}, "simpo": {"beta": 2.0, "gamma": 1.0}, "ipo": {"tau": 0.1},
}  # fmt: skip
STEERING = Steering(
    gain=0.1, integral_gain=0.005, smoothing=0.5, low=-1.0, high=1.0, every=2, num_fresh_steps=2
)


class Case:
    """One kind of calibration in both loops."""

    def __init__(self, kind: str, plain: dict[str, Any], options: dict[str, Any], source: str = "") -> None:
        self.kind, self.plain, self.options, self.source = kind, plain, options, source

    def settings(self, objective: str) -> Settings:
        return Settings(objective, self.kind, "sgd", LR, 0.0, **self.plain)

    def calibrator(self, objective: str, model: nn.Module) -> rcpo.Calibrator:
        sides: dict[str, Any] = {}
        if self.source == "head":
            sides = {"head": model.get_output_embeddings()}  # type: ignore[operator]
        elif self.source == "all":
            sides = {"parameters": model.parameters()}
        return rcpo.Calibrator(
            self.kind, load_objective(objective, **PARAMS[objective]), **sides, **self.options
        )


CASES = {
    "off": Case("off", {}, {}),
    "fixed": Case("fixed", {"alpha": 1.3}, {"alpha": 1.3}),
    "on": Case("on", {"every": 2, "warmup_steps": 2}, {"every": 2, "warmup_steps": 2}, "head"),
    "exact": Case(
        "exact", {"scope": "full", "estimator": "weighted", "ema_beta": 0.9},
        {"every": 1, "ema_beta": 0.9}, "all",
    ),
    "on-full": Case("on", {"scope": "full"}, {"every": 1}, "all"),
    "head-weighted": Case("on", {"estimator": "weighted"}, {"every": 1, "estimator": "weighted"}, "head"),
    "feedback": Case(
        "feedback", {"steering": STEERING},
        {"first_pass_steps": 2, "feedback": {"smoothing": 0.5, "low": -1.0, "high": 1.0, "every": 2}},
    ),
    "balance": Case("balance", {"balance_every": 2}, {"momentum": 0.0, "balance": {"every": 2}}),
}  # fmt: skip


def z_of(model: nn.Module, pairs: list[TokenizedPair], ref: bool = False) -> tuple[Tensor, Tensor]:
    z = summed(model, pairs)  # type: ignore[arg-type]
    return (z.z_w.detach(), z.z_l.detach()) if ref else (z.z_w, z.z_l)


def lengths(pairs: list[TokenizedPair]) -> tuple[Tensor, Tensor]:
    sides = ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    return tuple(  # type: ignore[return-value]
        torch.tensor([float(len(side.input_ids) - side.num_prompt) for side in side_of]) for side_of in sides
    )


def train_with(
    calibrator: rcpo.Calibrator,
    model: nn.Module,
    start: PreTrainedModel,
    batches: list[list[int]],
    split: int,
    after: Callable[[int], None] = lambda step: None,
) -> list[dict[str, float]]:
    """A loop of somebody's own: SGD, `split` pairs a micro-batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rows = []
    for step, indices in enumerate(batches):
        probe: tuple[float, ...] = ()
        if calibrator.wants_probe:
            with torch.no_grad():
                both = zip(z_of(model, PROBE), z_of(start, PROBE), strict=True)
                probe = tuple(float((now - then).mean()) for now, then in both)
        micro_batches = [indices[at : at + split] for at in range(0, len(indices), split)]
        for chosen in micro_batches:
            pairs = [PAIRS[idx] for idx in chosen]
            with torch.no_grad():
                ref = z_of(start, pairs)
            loss = calibrator.surrogate(*z_of(model, pairs), *ref, *lengths(pairs))
            (loss / len(micro_batches)).backward()
        rows.append(calibrator.update(*probe))
        optimizer.step()
        optimizer.zero_grad()
        after(step)
    return rows


def assert_rows(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(rows) == len(expected)
    for row, plain in zip(rows, expected, strict=True):
        for key in (
            "train/loss", "calibration/alpha", "incentive/chosen", "incentive/rejected", "score/chosen_norm",
            "score/rejected_norm", "score/cosine", "displacement/chosen", "logps/rejected",
        ):  # fmt: skip
            assert (key in row) == (key in plain), (row["step"], key)
            if key in plain:
                assert abs(row[key] - plain[key]) <= 1e-4 * abs(plain[key]) + 2e-5, (row["step"], key)


@pytest.mark.parametrize(
    ("name", "model_name", "split"),
    [*((name, "llama-tied", 2) for name in CASES), ("on", "neox", 4), ("exact", "neox", 1)],
)
def test_alpha_and_weights_are_the_plain_loops(name: str, model_name: str, split: int) -> None:
    """dpo, every kind of calibration, head and whole, tied and untied, whole batches and parts of them."""
    case, model = CASES[name], MODELS[model_name]()
    start = copy.deepcopy(model)
    plain = train_plainly(MODELS[model_name](), PAIRS, BATCHES, case.settings("dpo"), PROBE)
    rows = train_with(case.calibrator("dpo", model), model, start, BATCHES, split)
    assert_rows(rows, plain.rows)
    if name not in ("off", "fixed"):
        assert len({row["calibration/alpha"] for row in rows}) > 2, "alpha moves"
    for key, weight in model.named_parameters():
        torch.testing.assert_close(weight, plain.weights[key], atol=2e-5, rtol=0)


@pytest.mark.parametrize("objective", ["simpo", "ipo"])
def test_other_objectives(objective: str) -> None:
    model = MODELS["llama"]()
    start = copy.deepcopy(model)
    case = CASES["on"]
    plain = train_plainly(MODELS["llama"](), PAIRS, BATCHES, case.settings(objective), PROBE)
    assert_rows(train_with(case.calibrator(objective, model), model, start, BATCHES, 2), plain.rows)


def test_off_has_the_gradient_of_the_loss_itself() -> None:
    """The value is the objective's mean loss, and the gradient its gradient, to rounding."""
    model, pairs = MODELS["llama"](), PAIRS[:4]
    ref = [z - 0.5 for z in z_of(model, pairs, ref=True)]
    objective = load_objective("dpo")
    z_w, z_l = z_of(model, pairs)
    loss = objective(rcpo.objectives.PairLogProbs(z_w, z_l, *ref, *lengths(pairs))).mean()
    loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    made = rcpo.Calibrator("off", objective).surrogate(*z_of(model, pairs), *ref, *lengths(pairs))
    made.backward()
    assert made.item() == pytest.approx(loss.item(), rel=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_weights_of_pairs_multiply_their_losses() -> None:
    """Weight 2 and 0 of two pairs: the first alone, over two."""
    z = torch.tensor([-3.0, -4.0], requires_grad=True), torch.tensor([-5.0, -3.0], requires_grad=True)
    zeros, ones = torch.zeros(2), torch.ones(2)
    loss = rcpo.Calibrator("off", "dpo").surrogate(*z, zeros, zeros, ones, ones, torch.tensor([2.0, 0.0]))
    single = -math.log(1 / (1 + math.exp(-0.2)))
    assert loss.item() == pytest.approx(single)


def test_state_goes_on_where_it_stopped() -> None:
    """Saved after step 3 and loaded into another calibrator: the same alphas from step 4 on."""
    model = MODELS["llama"]()
    start = copy.deepcopy(model)
    case = CASES["exact"]
    calibrator, kept = case.calibrator("dpo", model), {}

    def keep(step: int) -> None:
        if step == 2:
            kept.update(state=calibrator.state_dict(), weights=copy.deepcopy(model.state_dict()))

    rows = train_with(calibrator, model, start, BATCHES, 4, keep)
    other = MODELS["llama"]()
    other.load_state_dict(kept["weights"])
    again = case.calibrator("dpo", other)
    again.load_state_dict(kept["state"])
    assert train_with(again, other, start, BATCHES[3:], 4) == rows[3:]
    with pytest.raises(rcpo.UserError, match="this one is off, and the state is of exact"):
        rcpo.Calibrator("off", "dpo").load_state_dict(kept["state"])


def test_statistics_of_the_objective_lag_one_step() -> None:
    """kto's z0 is max(0, mean of r over both sides) of the step before: 0, then (2 + 1)/2 = 1.5."""
    calibrator = rcpo.Calibrator("off", "kto")
    zeros, ones = torch.zeros(2), torch.ones(2)
    z = torch.full((2,), 2.0, requires_grad=True), torch.full((2,), 1.0, requires_grad=True)
    losses = []
    for _ in range(2):
        losses.append(calibrator.surrogate(*z, zeros, zeros, ones, ones).item())
        calibrator.update()
    beta = 0.1

    def s(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert losses == pytest.approx([2 - s(beta * (2 - z0)) - s(beta * (z0 - 1)) for z0 in (0.0, 1.5)])


# Several ranks


def rank_of_two(rank: int, port: int, folder: str) -> None:
    """Half of every batch, DDP, and what came of it in a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    result = {}
    for name in ("on", "exact", "feedback", "balance"):
        torch.manual_seed(0)
        model = MODELS["llama-tied"]()
        start = copy.deepcopy(model)
        calibrator = CASES[name].calibrator("dpo", model)
        halves = [batch[2 * rank : 2 * rank + 2] for batch in BATCHES]
        ddp = DistributedDataParallel(model)
        ddp.get_decoder = model.get_decoder  # type: ignore[assignment]
        rows = train_with(calibrator, ddp, start, halves, 2)
        result[name] = rows, {key: value.detach() for key, value in model.named_parameters()}
    dist.barrier()
    torch.save(result, f"{folder}/{rank}.pt")
    # Not by destructors: DDP's may wait for gloo's mutex with the GIL held, and gloo's thread the other way.
    os._exit(0)


@pytest.mark.timeout(120)
def test_two_ranks_have_one_alpha_and_it_is_that_of_one(tmp_path: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(rank_of_two, (port, str(tmp_path)), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in ("on", "exact", "feedback", "balance"):
        model = MODELS["llama-tied"]()
        rows = train_with(CASES[name].calibrator("dpo", model), model, copy.deepcopy(model), BATCHES, 4)
        assert first[name][0] == second[name][0]
        assert_rows(first[name][0], rows)
        for key, weight in model.named_parameters():
            torch.testing.assert_close(first[name][1][key], weight, atol=2e-5, rtol=0)


# What is refused


def pair(**changes: Any) -> list[Any]:
    zeros, ones = torch.zeros(2), torch.ones(2)
    made = {
        "z_w": torch.tensor([-3.0, -4.0], requires_grad=True),
        "z_l": torch.tensor([-5.0, -3.0], requires_grad=True),
        "ref_w": zeros, "ref_l": zeros, "len_w": ones, "len_l": ones,
    }  # fmt: skip
    return list((made | changes).values())


def fed(**changes: Any) -> Tensor:
    return rcpo.Calibrator("off", "dpo").surrogate(*pair(**changes))


def probed(kind: str, *probe: float) -> None:
    """The first step that wants a probe gets this one."""
    calibrator = rcpo.Calibrator(kind, "dpo")
    for _ in range(2):
        wanted = calibrator.wants_probe
        calibrator.surrogate(*pair())
        calibrator.update(*(probe if wanted else ()))


def uncalled() -> None:
    rcpo.Calibrator("on", "dpo", head=nn.Linear(2, 3)).surrogate(*pair())


def foreign() -> None:
    head = nn.Linear(2, 3)
    calibrator = rcpo.Calibrator("on", "dpo", head=head)
    head(torch.ones(1, 2))
    calibrator.surrogate(*pair())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lengths of the batch": (
        lambda: rcpo.Calibrator("off", load_objective("acpo", tau="batch")),
        "objective=acpo: reads the lengths of the global batch before its parts",
    ),
    "kind": (
        lambda: rcpo.Calibrator("balanced", "dpo"),
        r"Calibrator\('balanced', ...\): no such kind of calibration; choose one of off, on",
    ),
    "option": (lambda: rcpo.Calibrator("off", "dpo", evry=3), "evry: no such key"),
    "value": (lambda: rcpo.Calibrator("on", "dpo", ema_beta=1.0), "ema_beta=1.0: must be less than 1"),
    "alpha": (lambda: rcpo.Calibrator("fixed", "dpo"), "alpha: has no value and fixed needs one"),
    "limits": (
        lambda: rcpo.Calibrator("feedback", "dpo", feedback={"low": 1.0, "high": 0.5}),
        "calibration.feedback.high=0.5: must be at least",
    ),
    "objective": (lambda: rcpo.Calibrator("off", "dpoo"), "objective=dpoo: no such objective"),
    "tokens": (lambda: rcpo.Calibrator("off", "ti_dpo"), "objective=ti_dpo: weighs the tokens of z"),
    "mismatched": (
        lambda: rcpo.Calibrator("off", load_objective("kto", kl="mismatched")),
        "objective=kto: reads prompts with other pairs' responses, which a loop of your own does not score",
    ),
    "sides": (lambda: rcpo.Calibrator("on", "dpo"), r"give head=model.get_output_embeddings\(\) or param"),
    "both": (
        lambda: rcpo.Calibrator("on", "dpo", head=nn.Linear(1, 1), parameters=[]),
        "one of the two",
    ),
    "frozen": (lambda: rcpo.Calibrator("exact", "dpo", parameters=[]), "parameters: hold none that trains"),
    "shape": (lambda: fed(z_l=torch.zeros(3)), r"z_l: is shape \(3,\); give one number a pair"),
    "no tensor": (lambda: fed(len_w=3), "len_w: is int; give one number a pair"),
    "coarse": (lambda: fed(z_l=torch.zeros(2, dtype=torch.bfloat16)), "z_l: is torch.bfloat16, too coarse"),
    "detached": (lambda: fed(z_w=torch.zeros(2)), "z_w: is not attached to the graph"),
    "reference": (lambda: fed(ref_w=None), "ref_w, ref_l: are None, and dpo needs them"),
    "steering": (
        lambda: rcpo.Calibrator("feedback", "simpo").surrogate(*pair(ref_w=None, ref_l=None)),
        "ref_w, ref_l: are None, and calibration feedback needs them",
    ),
    "empty": (lambda: rcpo.Calibrator("off", "dpo").update(), r"calibrator.update: no surrogate\(\) since"),
    "probe": (lambda: probed("feedback"), "calibrator.update: feedback wants probe_r_w in this step"),
    "both probes": (
        lambda: probed("balance", 0.5), "calibrator.update: balance wants probe_r_w and probe_r_l in this",
    ),
    "uncalled": (uncalled, "calibrator.surrogate: head was not called"),
    "foreign": (foreign, "calibrator.surrogate: z does not come from the logits of head"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_one_line(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(rcpo.UserError, match=f"^.*{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_without_a_reference_there_is_no_displacement() -> None:
    calibrator = rcpo.Calibrator("off", "simpo")
    calibrator.surrogate(*pair(ref_w=None, ref_l=None))
    row = calibrator.update()
    assert row["step"] == 1
    assert not [key for key in row if key.startswith("displacement/")]


def test_every_kind_of_the_command_line_is_known() -> None:
    from rcpo.common.conf import conf_dir
    from rcpo.library.calibrator import KINDS

    assert set(KINDS) == {path.stem for path in (conf_dir() / "calibration").glob("*.yaml")}
