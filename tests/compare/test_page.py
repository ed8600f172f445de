"""The HTML report: one file that asks for nothing, escapes what it shows, and is drawn in a real browser."""

import html
import json
import os
import re
from pathlib import Path

import matplotlib.image
import pytest

from helpers import chromium
from helpers.compare_folders import START, compare, make_run
from rcpo import cli
from rcpo.comparison.fallen import find_fallen
from rcpo.comparison.page import make_page
from rcpo.comparison.table import make_rows
from rcpo.data.records import PreferenceRecord, shortened_texts

REJECTED = (-2.0, -2.0, -2.0, -2.0)
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"fail()\"> & \"q\" 'a'"


def page_of(path: Path) -> str:
    comparison = compare(path)
    return make_page(make_rows(comparison), comparison, "no")


def write_pairs(path: Path, words: str = "right") -> dict[str, object]:
    """Four pairs to hold out and one to train on; the settings of a run that does so."""
    rows = [
        {"prompt": f"question {idx}", "chosen": f"{words} {idx}", "rejected": f"wrong {idx}"}
        for idx in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = path.with_name("train.jsonl")
    train.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    return {"data.source": "file", "data.path": str(train), "data.eval_path": str(path), "data.eval_pairs": 4}


def test_the_pairs_whose_winner_fell_most_come_with_their_text(tmp_path: Path) -> None:
    """Under off the chosen of pair 3 loses 4 nats and that of pair 0 loses 1; the others rise."""
    settings = write_pairs(tmp_path / "eval.jsonl")
    make_run(tmp_path / "runs" / "off", settings=settings)
    make_run(
        tmp_path / "runs" / "on", "dpo", "on", settings=settings, change=((0.0, 1.0, 2.0, 0.5), REJECTED)
    )
    groups = compare(tmp_path / "runs").groups
    pairs = find_fallen({"dpo": groups}, "no")["dpo"].pairs
    assert [(pair.index, pair.changes) for pair in pairs] == [
        (3, {"off": -4.0, "on": 0.5}),
        (0, {"off": -1.0, "on": 0.0}),
    ]
    assert pairs[0].texts == ["question 3", "right 3", "wrong 3"]
    page = page_of(tmp_path / "runs")
    assert "The 2 pairs whose chosen response fell most under off" in page
    assert '<td class="text">right 3</td>' in page


def test_of_a_long_prompt_the_end_is_shown_and_of_a_response_the_beginning() -> None:
    record = PreferenceRecord("a" + "p" * 600 + "?", "b" * 600 + "z", "short", 0)
    prompt, chosen, rejected = shortened_texts(record)
    assert prompt == f"(2 characters before) … {'p' * 599}?"
    assert chosen == f"{'b' * 600} … (1 characters more)"
    assert rejected == "short"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.source": "file", "data.path": "/nowhere/pairs.jsonl"}, "data.path=/nowhere/pairs.jsonl"),
        ({"data.eval_pairs": 8}, "another number of held-out pairs"),
        ({"data.seed": "x"}, "cannot be read"),
    ],
)
def test_without_its_data_a_report_says_so(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    make_run(tmp_path / "run", settings=settings)
    page = page_of(tmp_path)
    assert said in html.unescape(page.split("Without their text: ")[1].split("</p>")[0])
    assert "<td>3</td>" in page


def test_a_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    """No script, style, picture or font comes from elsewhere; a policy in the page forbids it as well."""
    make_run(tmp_path / "run")
    page = page_of(tmp_path)
    without_plotly = re.sub(
        r"<script>(?!\s*\"use strict\";\n// Draws).*?</script>", "", page, count=1, flags=re.S
    )
    assert len(without_plotly) < 200_000 < len(page)
    assert not re.findall(r"(?:src|href)=[\"'](?!#|data:,)", without_plotly)
    assert "http" not in without_plotly.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in page


def test_text_of_runs_and_data_is_shown_and_never_run(tmp_path: Path) -> None:
    settings = write_pairs(tmp_path / "eval.jsonl", EVIL)
    make_run(tmp_path / "runs" / "off", EVIL, settings=settings)
    make_run(tmp_path / "runs" / "on", EVIL, "on", settings=settings)
    make_run(tmp_path / "runs" / "bad", status="failed", exit_reason=EVIL)
    page = page_of(tmp_path / "runs")
    assert "</script><script>document" not in page
    assert "<img src=x" not in page
    assert html.escape(EVIL) in page
    written = page.split('id="figures">')[1].split("</script>")[0]
    assert "<" not in written
    specs = json.loads(written)
    assert html.escape(EVIL) in specs[0]["data"][0]["y"][0]


def test_without_a_finished_run_there_is_a_page_that_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "run", status="failed", exit_reason="no memory")
    page = page_of(tmp_path)
    assert "There is no finished calibration=off run here" in page
    assert "failed: no memory" in page


def test_a_comparison_is_summed_up_in_words(tmp_path: Path) -> None:
    """dpo falls by 0.5 without calibration and rises with it; ipo rises. Both had the same speed."""
    for seed in (0, 1):
        make_run(tmp_path / f"a{seed}", "dpo", "off", seed)
        make_run(tmp_path / f"b{seed}", "dpo", "on", seed, change=((0.0, 1.0, 2.0, 1.0), REJECTED))
        make_run(tmp_path / f"c{seed}", "ipo", "off", seed, change=((1.0,) * 4, REJECTED))
    text = html.unescape(page_of(tmp_path))
    assert (
        "Without calibration 1 of 2 objectives pushes the held-out chosen responses down, dpo (-0.50 nats). "
        "With calibration it does not." in text
    )
    assert re.search(
        r"<b>dpo</b>: off -0\.50 nats; on \+1\.00, a difference of \+1\.50 \[.*\], not larger than the noise "
        r"of seeds and pairs \(p = \.\d+\); at 100% of the speed of off\.", text,
    )  # fmt: skip


def test_the_command_writes_the_page_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "off")
    page = tmp_path / "new" / "report.html"
    assert cli.dispatch(["compare", str(tmp_path / "runs"), "--html", str(page), "--csv"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("objective,calibration,n,")
    assert said.err == f"wrote {page}\n"
    assert page.read_text().endswith("</html>\n")
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for profiles; without a browser the test fails."""
    if (reason := chromium.missing()) is not None:
        pytest.fail(reason)
    return tmp_path_factory.mktemp("browser")


@pytest.mark.ci("browser")
@pytest.mark.slow
def test_a_grid_of_24_runs_of_1000_steps_is_drawn_in_five_seconds(tmp_path: Path, browser: Path) -> None:
    """Six objectives, four calibrations: 31 figures, no fault, nothing on the console. The best of three
    times, and longer where more processes run than there are cores."""
    for objective in ("dpo", "ipo", "simpo", "cpo", "ddro", "kto"):
        for calibration in ("off", "on", "exact", "feedback"):
            start = START.repeat(1, 64)
            change = [list(side) * 64 for side in ((-1.0, 1.0, 2.0, -4.0), REJECTED)]
            run = tmp_path / "runs" / f"{objective}-{calibration}"
            make_run(run, objective, calibration, steps=1000, start=start, change=change)
    page = tmp_path / "report.html"
    page.write_text(page_of(tmp_path / "runs"))
    limit = 5000 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    milliseconds = []
    for _ in range(3):
        seen = chromium.visit(page, browser)
        assert seen.console == []
        assert (seen.said("faults"), seen.said("figures")) == ("0", "31")
        assert len(re.findall(r'<div id="figure-\d+"', seen.html)) == 31
        milliseconds.append(float(seen.said("drawn-ms")))
        if milliseconds[-1] < limit:
            break
    assert min(milliseconds) < limit


@pytest.mark.ci("browser")
@pytest.mark.slow
def test_what_looks_like_a_script_in_the_data_is_text_in_the_browser(tmp_path: Path, browser: Path) -> None:
    settings = write_pairs(tmp_path / "eval.jsonl", EVIL)
    for calibration in ("off", "on"):
        make_run(tmp_path / "runs" / calibration, EVIL, calibration, settings=settings)
    page = tmp_path / "report.html"
    page.write_text(page_of(tmp_path / "runs"))
    seen = chromium.visit(page, browser)
    assert seen.console == []
    assert (seen.said("faults"), seen.said("figures")) == ("0", "6")
    assert "<title>rcpo: " in seen.html
    assert "<img" not in seen.html
    picture = tmp_path / "page.png"
    chromium.visit(page, browser, width=600, picture=picture)
    image = matplotlib.image.imread(picture)
    assert image.shape[1] == 600
    assert image[..., :3].std() > 0.1
