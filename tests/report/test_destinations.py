"""Where the probability went, as the report draws it from files of `rcpo lab tokens`."""

import json
from pathlib import Path

import pytest

from helpers.compare_folders import compare, make_run
from helpers.compare_page import page_of
from rcpo.common.errors import UserError
from rcpo.evaluation.moves import DESTINATIONS
from rcpo.report.destinations import NAMES, destination_figure


def look(run: Path, when: str, lost: float, *shares: float | None) -> None:
    to = {name: {"share": share, "per_nat": None} for name, share in zip(DESTINATIONS, shares, strict=True)}
    (run / "lab").mkdir(exist_ok=True)
    sides = {"chosen": {"lost": lost, "to": to}, "rejected": {"lost": 2 * lost, "to": to}}
    (run / "lab" / f"tokens-{when}.json").write_text(json.dumps(sides))


def test_the_names_are_those_of_the_files() -> None:
    assert tuple(NAMES) == DESTINATIONS


def test_mass_is_what_was_lost_by_its_shares_over_the_seeds_that_were_looked_at(tmp_path: Path) -> None:
    """off loses 2 and 4 a response at its end, half and a quarter of it to the other response: mean 1. A part
    that lost too is below 0. on lost nothing, and has no shares. The third seed was not looked at."""
    look(make_run(tmp_path / "off-0", seed=0), "final", 2.0, 0.5, 0.0, 0.75, -0.25)
    look(make_run(tmp_path / "off-1", seed=1), "final", 4.0, 0.25, 0.0, 0.5, 0.25)
    look(tmp_path / "off-1", "step-000050", 1.0, 1.0, 0.0, 0.0, 0.0)
    make_run(tmp_path / "off-2", seed=2)
    look(make_run(tmp_path / "on", "dpo", "on"), "final", 0.0, None, None, None, None)
    figure = destination_figure(compare(tmp_path).groups)
    assert figure is not None
    assert "looked at (off 2, on 1)" in figure.caption
    spec = figure.spec()
    chosen, rejected = spec["data"][:4], spec["data"][4:]
    assert all(trace["x"] == [["off", "off", "on"], ["step 50", "end", "end"]] for trace in spec["data"])
    assert [trace["y"] for trace in chosen] == [[1, 1, 0], [0, 0, 0], [0, 1.75, 0], [0, 0.25, 0]]
    assert [trace["y"] for trace in rejected] == [[2, 2, 0], [0, 0, 0], [0, 3.5, 0], [0, 0.5, 0]]
    assert "Where the probability went" in page_of(tmp_path)


def test_without_such_files_there_is_no_figure_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "off")
    assert destination_figure(compare(tmp_path).groups) is None
    look(run, "final", 2.0, 0.5, 0.0, 0.5, 0.0)
    (run / "lab" / "tokens-final.json").write_text("{")
    with pytest.raises(
        UserError, match=r"tokens-final.json: is damaged; remove it, and type rcpo lab tokens"
    ):
        destination_figure(compare(tmp_path).groups)
