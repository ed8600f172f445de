"""`rcpo compare` as it is typed: the table in each form, filters, sorting, and one line for bad input."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import forked
from helpers.compare_folders import make_run
from rcpo import cli

REJECTED = (-2.0, -2.0, -2.0, -2.0)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of dpo without and with calibration, one of ipo, and one that failed."""
    folder = tmp_path_factory.mktemp("grid")
    for seed in (0, 1):
        make_run(folder / f"dpo-off-{seed}", "dpo", "off", seed)
        change = ((0.5, 1.0, 2.0, seed), REJECTED)
        make_run(folder / f"dpo-on-{seed}", "dpo", "on", seed, change=change)
    make_run(folder / "ipo-off-0", "ipo", "off", change=((1.0, 1.0, 1.0, 1.5), REJECTED))
    make_run(folder / "ipo-on-0", "ipo", "on", status="failed", exit_reason="out of memory")
    return folder


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints; it ends well."""
    assert cli.dispatch(["compare", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The line that a user reads."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *words])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    return said.err


def records(text: str) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["objective"], row["calibration"]): row for row in csv.DictReader(io.StringIO(text))}


def test_csv_has_a_line_a_group_with_the_numbers_worked_by_hand(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """off: chosen (-1, 1, 2, -4), mean -0.5; the lowest evaluation is the last. Rejected -2, so the margins
    are 1, 3, 4, -2 and three of four pairs are right. on: means 0.875 and 1.125, so 1 with error 0.125."""
    rows = records(typed(capsys, str(grid), "--csv"))
    assert list(rows) == [("dpo", "off"), ("dpo", "on"), ("ipo", "off"), ("ipo", "on")]
    off, on = rows["dpo", "off"], rows["dpo", "on"]
    expected = {
        "n": "2", "seeds": "0,1", "chosen": "-0.5", "chosen_se": "0.0", "rejected": "-2.0", "margin": "1.5",
        "accuracy": "0.75", "fell": "0.5", "worst": "-0.5", "pairs_per_second": "104.5", "memory_gb": "0.5",
        "vs_off_chosen": "",
    }  # fmt: skip
    assert {key: off[key] for key in expected} == expected
    assert (on["chosen"], on["chosen_se"], on["worst"]) == ("1.0", "0.125", "0.0")
    assert (on["vs_off_chosen"], on["vs_off_fell"], on["vs_off_seeds"]) == ("1.5", "-0.5", "2")
    assert float(on["vs_off_chosen_low"]) < 1.5 < float(on["vs_off_chosen_high"])
    failed = rows["ipo", "on"]
    assert (failed["n"], failed["left_out"], failed["chosen"]) == ("0", "1", "")


def test_the_share_in_band_is_of_the_steps_that_off_measured_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 8 steps the odd ones are inside, where the band is open, and the second: 5 of 8. Where off measured
    the even ones only, 1 of 4."""
    off = make_run(tmp_path / "off", "dpo", "off")
    make_run(tmp_path / "on", "dpo", "on")
    rows = records(typed(capsys, str(tmp_path), "--csv"))
    assert [row["in_band"] for row in rows.values()] == ["0.625", "0.625"]
    lines = (off / "metrics.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    even = [row if row["step"] % 2 == 0 else {"step": row["step"]} for row in kept]
    (off / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in even))
    rows = records(typed(capsys, str(tmp_path), "--csv"))
    assert [row["in_band"] for row in rows.values()] == ["0.25", "0.25"]


def test_json_says_which_runs_made_a_number_and_why_others_did_not(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads(typed(capsys, str(grid), "--json"))
    assert [len(group["runs"]) for group in tree["cells"]] == [2, 2, 1, 0]
    assert tree["cells"][0]["vs_off_chosen"] is None
    assert tree["left_out"] == [{"path": str(grid / "ipo-on-0"), "reason": "failed: out of memory"}]
    assert tree["common_settings"]["data.source"] == "arithmetic"


def test_where_nothing_is_a_terminal_the_table_is_markdown_with_its_notes(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = typed(capsys, str(grid))
    assert text == typed(capsys, str(grid), "--markdown")
    lines = text.splitlines()
    widths = {len(line) for line in lines[:6]}
    assert len(widths) == 1
    assert re.match(r"\| dpo-off-0 \+1 +\| dpo +\| off +\| +2 \| -0.50 ± 0.00 \|", lines[2])
    assert re.match(r"\| ipo-on-0 +\| ipo +\| on +\| +0 \| +- \|", lines[5])
    assert "\x1b" not in text
    assert (
        "Without calibration 1 of 2 objectives pushes the held-out chosen responses down, dpo (-0.50" in text
    )
    assert "With calibration it does not." in text
    assert f"- left out: {grid / 'ipo-on-0'}: failed: out of memory" in lines
    assert "standard error over the n seeds" in text


def test_latex_is_a_whole_tabular_with_escaped_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", "dil_bce", "off")
    make_run(tmp_path / "b", "dil_bce", "on", settings={"data.columns": "50%_&#"})
    text = typed(capsys, str(tmp_path), "--latex")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert body[0].startswith(r"\begin{tabular}{lll")
    assert body[-1] == r"\end{tabular}"
    assert r"tiny on arithmetic, data.columns=50\%\_\&\# & b & dil\_bce & on &" in text
    rows = [line for line in body if line.endswith(r"\\")]
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1


@pytest.mark.parametrize(
    ("words", "cells"),
    [
        (["--where", "objective=ipo"], ["ipo off", "ipo on"]),
        (["--where", "calibration=on", "--where", "status=done"], ["dpo on"]),
        (["--where", "objective=dpo,ipo", "--where", "seed=1"], ["dpo off", "dpo on"]),
        (["--where", "objective.beta=1e-1"], ["dpo off", "dpo on"]),
        (["--sort", "chosen"], ["dpo off", "dpo on", "ipo off", "ipo on"]),
        (["--sort=-chosen"], ["ipo off", "dpo on", "dpo off", "ipo on"]),
        (["--sort", "calibration"], ["dpo off", "ipo off", "dpo on", "ipo on"]),
        (["--sort=-objective"], ["ipo off", "ipo on", "dpo off", "dpo on"]),
        (["--sort", "vs_off"], ["dpo on", "dpo off", "ipo off", "ipo on"]),
    ],
)
def test_rows_are_filtered_and_sorted(
    grid: Path, capsys: pytest.CaptureFixture[str], words: list[str], cells: list[str]
) -> None:
    """Groups without a value come last, whichever way the others go."""
    rows = records(typed(capsys, str(grid), "--csv", *words))
    assert [" ".join(cell) for cell in rows] == cells


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: is not there"),
        (["--csv"], "arguments are required: PATH"),
        (
            ["{grid}", "--sort", "loss"],
            "--sort loss: no such column; choose one of objective, calibration, chosen",
        ),
        (["{grid}", "--where", "objective"], "--where objective: is no KEY=VALUE"),
        (["{grid}", "--where", "beta=0.1"], "type --where objective.beta=VALUE"),
        (["{grid}", "--where", "objective=kto"], "no run has that; objective.name is dpo, ipo"),
        (["{grid}", "--csv", "--json"], "not allowed with argument"),
        (["{grid}", "--colour"], "unrecognized arguments: --colour"),
        (["{grid}", "--html", "{grid}/dpo-off-0/config.yaml/page.html"], "config.yaml is no folder that can"),
    ],
)
def test_bad_input_is_one_line(
    grid: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refused(capsys, *(word.format(grid=grid) for word in words))


def test_nothing_to_compare_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (make_run(tmp_path / "a") / "config.yaml").write_text("[")
    assert "config.yaml cannot be read; there is nothing to compare" in refused(capsys, str(tmp_path))


def test_a_real_run_is_read(tmp_path: Path) -> None:
    """What `rcpo train` writes is what `rcpo compare` reads: the numbers of eval.jsonl and metrics.jsonl, and
    the text of the same pairs."""
    words = ["train.steps=2", "data.train_pairs=64", "data.eval_pairs=8", "tracking=none", "run_dir=runs/one"]
    for command in (
        ["train", "objective=dpo", "calibration=on", *words],
        ["compare", "runs", "--csv", "--html", "report.html"],
    ):
        done = forked.rcpo(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (row,) = records(done.stdout).values()
    last = json.loads((tmp_path / "runs/one/eval.jsonl").read_text().splitlines()[-1])
    assert float(row["chosen"]) == pytest.approx(last["displacement/chosen"])
    assert float(row["fell"]) == pytest.approx(last["displacement/chosen_down"])
    assert float(row["loss"]) == pytest.approx(last["loss"])
    assert (row["n"], row["left_out"], row["note"]) == ("1", "0", "")
    assert float(row["memory_gb"]) > 0
    assert float(row["pairs_per_second"]) > 0
    assert row["in_band"]
    page = (tmp_path / "report.html").read_text()
    assert "Without their text" not in page
    assert ("CHES per token" in page) == ("whose chosen response fell most" in page)


def test_a_reader_that_goes_away_is_no_error(grid: Path) -> None:
    """`rcpo compare --csv | head -1`, with a pipe that is closed before anything is written."""
    for form in ("--csv", "--markdown"):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "rcpo.cli", "compare", str(grid), form]
        with os.fdopen(write, "w") as closed:
            done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_many_runs_left_out_for_one_reason_are_one_line_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(7):
        make_run(tmp_path / str(seed), seed=seed, status="pending", exit_reason="no\nslot\x1b[2J")
    text = typed(capsys, str(tmp_path))
    five = ", ".join(str(tmp_path / str(seed)) for seed in range(5))
    assert f"- left out: {five} and 2 more: pending: no slot [2J" in text.splitlines()
    assert "\x1b" not in text


def test_what_rounding_may_have_made_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four pairs with a noise of 1 nat: a floor of 1, of the margin 1.41, and of the mean of four seeds half
    of it. -0.50 is within that of one seed and not of four."""
    change = ((-0.5, -0.5, -0.5, -0.5), REJECTED)
    for seed in range(4):
        make_run(tmp_path / f"many-{seed}", "dpo", "off", seed, change=change, noise=0.99)
    make_run(tmp_path / "one", "ipo", "off", 0, change=change, noise=1.0)
    out = typed(capsys, str(tmp_path))
    of_dpo, of_ipo = (
        next(each for each in out.splitlines() if f"| {name} " in each) for name in ("dpo", "ipo")
    )
    assert "| -0.50 ± 0.00 | -2.00 ± 0.00 |" in of_dpo
    assert "~" not in of_dpo
    assert "-0.50~ |" in of_ipo
    assert "-2.00 |" in of_ipo
    assert "~: no more than rounding may have made of the mean; the noise floor of bfloat16" in out
    groups = json.loads(typed(capsys, str(tmp_path), "--json"))["cells"]
    assert [group["noise_floor"] for group in groups] == pytest.approx([0.495, 1.0])


def test_whether_a_model_looks_is_a_column_whose_difference_is_paired_by_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Differences of the seeds .20, .15 and .25: mean .2, standard error .05 / sqrt(3), t of 2 degrees of
    freedom 4.303, so that the interval reaches .1242. A group without another seed in common has none."""
    gains = {"off": (0.2, 0.3, 0.25), "balance": (0.4, 0.45, 0.5), "exact": (0.4,)}
    for calibration, of_seeds in gains.items():
        for seed, gain in enumerate(of_seeds):
            path = tmp_path / "seeds" / f"{calibration}-{seed}"
            make_run(path, "dpo", calibration, seed, at_end={"vision_gain": gain})
    found = records(typed(capsys, str(tmp_path / "seeds"), "--csv"))
    row = found["dpo", "balance"]
    assert float(row["vision_gain"]) == pytest.approx(0.45)
    assert float(row["vision_gain_se"]) == pytest.approx(0.05 / 3**0.5)
    of_off = {name: float(row[f"vs_off_vision_gain{name}"]) for name in ("", "_low", "_high")}
    assert of_off == pytest.approx({"": 0.2, "_low": 0.0758, "_high": 0.3242}, abs=1e-4)
    assert 0.01 < float(row["vs_off_vision_gain_p"]) < 0.05
    assert found["dpo", "exact"]["vs_off_vision_gain"] == "0.2"
    assert found["dpo", "exact"]["vs_off_vision_gain_low"] == ""
    said = typed(capsys, str(tmp_path / "seeds"), "--markdown")
    assert "+0.450 ± 0.029" in said
    assert "+0.200 [+0.076, +0.324]" in said
    assert "(+0.200)" in said
    assert "vision gain: share of held-out pairs" in said
    cells = json.loads(typed(capsys, str(tmp_path / "seeds"), "--json"))["cells"]
    assert [round(cell["vision_gain"], 3) for cell in cells] == [0.25, 0.4, 0.45]
    typed(capsys, str(tmp_path / "seeds"), "--html", str(tmp_path / "page.html"))
    assert "+0.200 [+0.076, +0.324]" in (tmp_path / "page.html").read_text()
    make_run(tmp_path / "text")
    assert "vision" not in typed(capsys, str(tmp_path / "text"), "--markdown")
