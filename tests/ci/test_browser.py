"""The HTML report in a real browser: drawn in time, without a fault, and what it shows is text."""

import os
import re
from pathlib import Path

import matplotlib.image
import pytest

from helpers import chromium
from helpers.compare_folders import START, make_run
from helpers.compare_page import EVIL, REJECTED, page_of, write_pairs

pytestmark = pytest.mark.ci("browser", needs="chromium")


def test_a_grid_of_24_runs_of_1000_steps_is_drawn_in_five_seconds(tmp_path: Path) -> None:
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
        seen = chromium.visit(page, tmp_path / "browser")
        assert seen.console == []
        assert (seen.said("faults"), seen.said("figures")) == ("0", "31")
        assert len(re.findall(r'<div id="figure-\d+"', seen.html)) == 31
        milliseconds.append(float(seen.said("drawn-ms")))
        if milliseconds[-1] < limit:
            break
    assert min(milliseconds) < limit


def test_what_looks_like_a_script_in_the_data_is_text_in_the_browser(tmp_path: Path) -> None:
    settings = write_pairs(tmp_path / "eval.jsonl", EVIL)
    for calibration in ("off", "on"):
        make_run(tmp_path / "runs" / calibration, EVIL, calibration, settings=settings)
    page = tmp_path / "report.html"
    page.write_text(page_of(tmp_path / "runs"))
    seen = chromium.visit(page, tmp_path / "browser")
    assert seen.console == []
    assert (seen.said("faults"), seen.said("figures")) == ("0", "6")
    assert "<title>rcpo: " in seen.html
    assert "<img" not in seen.html
    picture = tmp_path / "page.png"
    chromium.visit(page, tmp_path / "browser", width=600, picture=picture)
    image = matplotlib.image.imread(picture)
    assert image.shape[1] == 600
    assert image[..., :3].std() > 0.1
