"""The HTML report: one file that asks for nothing and escapes what it shows. `tests/ci/test_browser.py` opens
it."""

import html
import json
import re
from pathlib import Path

import pytest

from helpers.compare_folders import compare, make_run
from helpers.compare_page import EVIL, REJECTED, page_of, write_pairs
from rcpo import cli
from rcpo.records.record import PreferenceRecord, shortened_texts
from rcpo.report.fallen import find_fallen


def test_the_pairs_whose_chosen_fell_most_come_with_their_text(tmp_path: Path) -> None:
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
    assert "&lt;/script&gt;&lt;script&gt;document" in page
    written = page.split('id="figures">')[1].split("</script>")[0]
    assert "<" not in written
    specs = json.loads(written)
    label = specs[0]["data"][0]["y"][0]
    assert html.escape(EVIL).replace(" ", "") in label.replace("<br>", "").replace(" ", "")


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
