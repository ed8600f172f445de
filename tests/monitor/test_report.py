"""The summary, the sentence, the table and the model card, from rows written by hand."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rcpo.commands.train import prepare
from rcpo.config.schema import Config
from rcpo.monitor.model_card import averages, formula, is_hub_id, model_card
from rcpo.monitor.summary import noise_text, print_report, print_start, sentence, summarize, table_rows
from rcpo.objectives import load_objective
from rcpo.objectives.registry import REGISTRY
from rcpo.runs.folder import RunFolder

Row = dict[str, Any]


def evaluation(step: int, chosen: float, rejected: float = -2.0, down: float = 0.25) -> Row:
    return {
        "step": step,
        "displacement/chosen": chosen,
        "displacement/rejected": rejected,
        "displacement/margin": chosen - rejected,
        "displacement/accuracy": 0.75,
        "displacement/chosen_down": down,
        "displacement/both_down": 0.125,
    }


def summary_of(*chosen: float, step_rows: list[Row] | None = None) -> Row:
    """The summary of a run with these held-out chosen displacements, 10 steps apart."""
    evaluations = [evaluation(10 * idx, value) for idx, value in enumerate(chosen)]
    return summarize(step_rows or [], evaluations)


def config_of(*words: str) -> Config:
    config = prepare(["name=a-run", "train.device=cpu", *words])
    assert config is not None
    return config


def test_a_change_within_the_noise_floor_is_called_none() -> None:
    """-0.3 nats under a floor of 0.4 are no displacement; under one of 0.2 they are, and no mark stands."""
    for floor, mark, said in ((0.4, "~", "by no more than rounding does"), (0.2, "", "became less likely")):
        rows = [evaluation(step, -0.3 * step) | {"displacement/noise_floor": floor} for step in (0, 1)]
        summary = summarize([], rows)
        assert said in sentence(summary)
        assert noise_text(summary) == f" ~: within the noise floor of bfloat16, {floor} nats."
        assert table_rows(summary)[-1][1:3] == (f"-0.30{mark} nats", "-2.00 nats")


def test_the_summary_by_hand() -> None:
    """Band measured on 3 of 4 steps, 2 of them inside; speeds 10, 20, 30, 1000 have the median 25."""
    steps: list[Row] = [
        {"step": 1, "speed/pairs_per_second": 10.0, "band/inside": 1.0, "calibration/alpha": 1.0},
        {"step": 2, "speed/pairs_per_second": 20.0, "band/inside": 0.0, "calibration/alpha": 1.1},
        {"step": 3, "speed/pairs_per_second": 1000.0, "band/inside": 1.0, "calibration/alpha": 1.2},
        {"step": 4, "speed/pairs_per_second": 30.0, "calibration/alpha": 1.3},
    ]
    last = evaluation(4, -1.5, -2.5) | {"loss": 0.5}
    summary = summarize(steps, [evaluation(0, 0.0), evaluation(2, -3.5), last])
    assert summary == {
        "steps": 4,
        "start_step": 0,
        "start_chosen": 0,
        "start_rejected": -2,
        "start_margin": 2,
        "start_accuracy": 0.75,
        "start_chosen_down": 0.25,
        "start_both_down": 0.125,
        "start_loss": None,
        "end_step": 4,
        "end_chosen": -1.5,
        "end_rejected": -2.5,
        "end_margin": 1,
        "end_accuracy": 0.75,
        "end_chosen_down": 0.25,
        "end_both_down": 0.125,
        "end_loss": 0.5,
        "worst_chosen": -3.5,
        "worst_step": 2,
        "in_band_share": pytest.approx(2 / 3),
        "alpha": 1.3,
        "pairs_per_second": 25,
        "noise_floor": None,
    }


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_none_and_never_the_worst(broken: float) -> None:
    """chosen 0, -1, broken: the end is unknown, the worst is -1 at step 10; run.json stays strict JSON."""
    steps = [{"step": 20, "calibration/alpha": broken}]
    summary = summarize(steps, [evaluation(0, 0), evaluation(10, -1), evaluation(20, broken, broken)])
    assert (summary["end_chosen"], summary["end_rejected"], summary["alpha"]) == (None, None, None)
    assert (summary["worst_chosen"], summary["worst_step"]) == (-1, 10)
    json.dumps(summary, allow_nan=False)


def test_a_run_that_measured_nothing_has_a_summary_too() -> None:
    summary = summarize([], [])
    assert summary.pop("steps") == 0
    assert set(summary.values()) == {None}
    assert "no finite measurement" in sentence(summary)


LESS, SAME, MORE = (
    f"The chosen responses {became}: {{:+.2f}} nats on average, 25% of them fell."
    for became in ("became less likely", "kept their likelihood", "became more likely")
)
DISPLACED = " This is likelihood displacement; calibration="


@pytest.mark.parametrize(
    ("end", "calibration", "expected"),
    [
        (-1.5, "off", LESS + DISPLACED + "balance is made against it."),
        (-1.5, "on", LESS + DISPLACED + "on did not prevent it here; calibration=balance may."),
        (-0.1, "exact", LESS + DISPLACED + "exact did not prevent it here; calibration=balance may."),
        (-0.1, "balance", LESS + DISPLACED + "balance did not prevent it here."),
        (-0.09, "off", SAME),
        (0.09, "on", SAME),
        (0.1, "on", MORE),
    ],
)
def test_the_sentence_says_what_happened(end: float, calibration: str, expected: str) -> None:
    assert sentence(summary_of(0.0, end), calibration) == expected.format(end)


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_the_sentence_claims_nothing_about_a_change_that_is_not_finite(end: float) -> None:
    assert sentence(summary_of(0.0, end), "on") == (
        "There is no finite measurement of the held-out chosen responses at the end: look into eval.jsonl."
    )


def test_one_evaluation_says_nothing_about_a_change() -> None:
    assert "measured once only" in sentence(summary_of(0.0))


def report_of(summary: Row, folder: Path, *, terminal: bool, width: int = 80) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None)
    print_report(console, RunFolder(folder), config_of("objective=simpo", "calibration=on"), summary)
    return stream.getvalue()


def test_the_report_in_a_file_is_ascii_with_whole_paths(tmp_path: Path) -> None:
    """A path longer than the console stays on one line; the table is Markdown."""
    folder = tmp_path / ("long-name-" * 9)
    (folder / "wandb" / "offline-run-1").mkdir(parents=True)
    lines = report_of(summary_of(0.0, -1.5), folder, terminal=False).splitlines()
    assert all(line.isascii() for line in lines)
    assert lines[1].rstrip() == "Change of log-probability, objective=simpo calibration=on"
    assert "| step 10        | -1.50 nats | -2.00 nats |     0.75 |         25% |" in lines
    assert f"run folder {folder}" in lines
    assert f"model      {folder}/final" in lines
    assert f"plot       {folder}/displacement.png" in lines
    assert f"W&B        offline; wandb sync {folder}/wandb/offline-run-1" in lines
    assert sentence(summary_of(0.0, -1.5), "on", "simpo") in lines


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_report_on_a_terminal_has_the_same_numbers(tmp_path: Path, width: int) -> None:
    text = report_of(summary_of(0.0, 0.5), tmp_path, terminal=True, width=width)
    for part in ("+0.50", "-2.00", "0.75", "25%", "more", "likely"):
        assert part in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= width


def test_the_report_of_an_online_run_has_its_address(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"wandb_url": "https://wandb.ai/team/rcpo/runs/1"}')
    assert "W&B        https://wandb.ai/team/rcpo/runs/1" in report_of(
        summary_of(0.0), tmp_path, terminal=False
    )


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    text = report_of(summary_of(0.0, math.nan), tmp_path, terminal=False)
    assert "| step 10        |          - | -2.00 nats |     0.75 |         25% |" in text


def test_the_first_line_says_what_is_trained_on_what() -> None:
    stream = io.StringIO()
    print_start(
        Console(file=stream, width=40), config_of("objective=ipo", "train.pairs_per_step=8"), 2048, 256
    )
    assert stream.getvalue() == (
        "objective=ipo calibration=off  tiny on arithmetic: 2048 training pairs, 256 held out, 8 a step\n"
    )


def front_matter(card: str) -> Row:
    opening, matter, _ = card.split("---\n", 2)
    assert opening == ""
    parsed: Row = yaml.safe_load(matter)
    return parsed


def test_the_model_card_says_objective_calibration_and_displacement() -> None:
    steps = [{"step": 20, "calibration/alpha": 1.25, "band/inside": 1.0}]
    card = model_card(
        config_of("objective=simpo", "calibration=on"),
        summary_of(0, -0.5, 0.3, step_rows=steps),
        "runs/x/final",
    )
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rcpo", "preference-optimization", "simpo", "calibration-on"],
    }
    for part in (
        "# a-run",
        "tiny after 20 optimizer steps of preference optimisation on\narithmetic",
        "**simpo**, beta = 2.0, gamma = 1.0:\n\n    " + formula(load_objective("simpo")),
        "this objective divides by the response length",
        "on: scope head, estimator mean, ema_beta 0.98. The last step's alpha was 1.2500",
        "100% of the measured steps lay inside",
        "| held-out pairs | chosen | rejected | accuracy | chosen fell |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| step 0 | +0.00 nats | -2.00 nats | 0.75 | 25% |\n"
        "| step 20 | +0.30 nats | -2.00 nats | 0.75 | 25% |",
        "The chosen responses became more likely: +0.30 nats",
        "The lowest chosen value was -0.50 nats, at step 10.",
        'AutoModelForCausalLM.from_pretrained("runs/x/final")',
    ):
        assert part in card


def test_the_model_card_says_what_can_load_the_folder() -> None:
    """A whole model, and an adapter with the words that go on from it."""
    whole = model_card(config_of("model.lora.rank=4"), summary_of(0, 1), "runs/x/final")
    assert "This needs transformers 5. For transformers 4, `rcpo export RUN OUT --transformers4`" in whole
    adapter = model_card(
        config_of("model.lora.rank=4", "model.lora.save=adapter"), summary_of(0, 1), "runs/x/final"
    )
    assert "This needs transformers, peft, and the base model" in adapter
    words = "model.path=BASE model.lora.adapter=runs/x/final model.lora.on_adapter=merge model.lora.rank=4."
    assert words in adapter


def test_the_model_card_of_a_run_without_numbers_can_be_written() -> None:
    card = model_card(
        config_of("calibration=on"), summarize([{"step": 1, "calibration/alpha": math.nan}], []), "final"
    )
    assert "The last step's alpha was not finite" in card
    front_matter(card)


def test_the_model_card_names_hub_ids_and_no_path_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative folder OWNER/NAME that exists looks like a hub id and is none."""
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = ("data=file", "data.path=someone/pairs")
    card = model_card(config_of("model.path=someone/model-1.5B", *data), summary_of(0, 1), "runs/x/final")
    assert front_matter(card)["base_model"] == "someone/model-1.5B"
    assert front_matter(card)["datasets"] == ["someone/pairs"]
    for path in ("owner/model", str(tmp_path / "owner" / "model"), "./owner/model"):
        card = model_card(config_of(f"model.path={path}"), summary_of(0, 1), "runs/x/final")
        assert "base_model" not in front_matter(card)
        assert str(tmp_path) not in card
    assert not is_hub_id("builtin:tiny")


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"mix"}))
def test_every_objective_has_a_formula_for_its_card(name: str) -> None:
    """One line in the contract's symbols, and it says where log-probs are averaged (design, section 3)."""
    objective = load_objective(name)
    assert "\n" not in formula(objective)
    assert re.search(r"\b(z_w|r_w|mt|m|s_w|margin|zbar_w|rbar_w|a|[rzp]_[ik]|R_i)\b", formula(objective))
    averaging = {
        "sft",
        "dpo_norm",
        "ipo",
        "simpo",
        "cpo",
        "orpo",
        "rpo",
        "alpha_po",
        "lire",
        "pl_simpo",
        "rrhf",
    }
    assert averages(objective) == (name in averaging), formula(objective)
