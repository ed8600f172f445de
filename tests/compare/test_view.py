"""What a table of mixed runs shows: which run a line is, keys that matter alone, as wide as the terminal, and
columns of the user's own."""

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from helpers.compare_folders import compare, make_run
from rcpo import cli
from rcpo.comparison.summary import headline, sentences
from rcpo.comparison.table import make_lines, notes
from rcpo.comparison.terminal import print_table
from rcpo.comparison.view import make_view

REJECTED = (-2.0, -2.0, -2.0, -2.0)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve runs as a week leaves them: objectives, rates, adapters, ranks, and data of one's own."""
    folder = tmp_path_factory.mktemp("mixed")
    own = {"data.source": "file", "data.path": "/home/me/pairs.jsonl", "data.train_pairs": None}
    settings = {
        "dpo-off": {}, "dpo-beta": {"objective.beta": 0.5}, "two-ranks": {"launch.processes": 2},
        "micro": {"train.pairs_per_device": 1, "model.attention": "eager"}, "lora": {"model.lora.rank": 4},
        "fast": {"optim.lr": 0.001}, "long": {"train.steps": 6}, "mine": own,
        "mine-fast": own | {"optim.lr": 0.001},
    }  # fmt: skip
    for name, own_settings in settings.items():
        make_run(folder / name, "dpo", "off", settings=own_settings)
    make_run(folder / "dpo-on", "dpo", "on", change=((0.5, 1.0, 2.0, 1.0), REJECTED))
    make_run(folder / "simpo-off", "simpo", "off", change=((1.0, 1.0, 2.0, 1.0), REJECTED))
    make_run(folder / "simpo-on", "simpo", "on", change=((1.0, 1.0, 2.0, 1.0 + 2e-6), REJECTED))
    return folder


def on_terminal(folder: Path, width: int) -> list[str]:
    comparison = compare(folder)
    lines = make_lines(comparison)
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=50)
    print_table(console, lines, comparison, make_view(lines, comparison))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_folder_of_mixed_runs_fits_the_terminal_and_names_every_run(mixed: Path, width: int) -> None:
    said = on_terminal(mixed, width)
    assert max(map(len, said)) <= width
    text = "\n".join(said)
    assert "…" not in text
    begun = {line.split()[0] for line in said if line.strip()}
    assert begun >= {path.name for path in mixed.iterdir()}
    for key in ("pairs_per_device", "launch.processes", "model.attention", "data.train_pairs", "data.source"):
        assert key not in text
    assert {"optim.lr=0.001", "model.lora.rank=4", "train.steps=6", "beta=0.5"} <= set(text.split())
    kinds = [said.index("tiny on arithmetic"), said.index("tiny on pairs.jsonl")]
    assert kinds == sorted(kinds)
    assert any(line.startswith("mine ") for line in said[kinds[1] :])
    assert ("rejected" in said[kinds[0] + 1].split()) == (width == 160)


@pytest.mark.parametrize("width", [80, 160])
def test_the_date_of_a_name_goes_on_in_the_next_line_and_leaves_room(tmp_path: Path, width: int) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"simpo-balance-tiny-20261129-02343{seed}", "simpo", "balance", seed=seed)
    make_run(tmp_path / "dpo-off-tiny-20261129-023531", settings={"optim.lr": 1e-4})
    make_run(tmp_path / "dpo-off-tiny-20261129-023532")
    said = on_terminal(tmp_path, width)
    at = next(idx for idx, line in enumerate(said) if line.startswith("simpo-balance-tiny- "))
    assert said[at + 1].split()[:2] == ["20261129-023430", "+1"]
    assert "settings" in next(line for line in said if line.startswith("run "))
    assert max(map(len, said)) <= width


def test_groups_that_differ_in_their_speed_alone_have_labels_of_their_own(mixed: Path) -> None:
    labels = [group.label for group in compare(mixed).groups]
    assert len(set(labels)) == len(labels) == 12
    assert {"dpo off", "dpo off (micro)", "dpo off (two-ranks)"} <= set(labels)


def test_parameters_of_most_of_an_objective_go_without_saying_and_stand_in_a_note(tmp_path: Path) -> None:
    """Where none is of most, each group says its own."""
    for number, beta in enumerate((0.1, 0.1, 0.1, 0.5)):
        make_run(tmp_path / str(number), settings={"objective.beta": beta, "optim.lr": 0.1 / (number + 1)})
    comparison = compare(tmp_path)
    assert {group.objective for group in comparison.groups} == {"dpo", "dpo beta=0.5"}
    assert any("dpo's beta=0.1" in line for line in notes(comparison, "+-"))
    make_run(tmp_path / "4", settings={"objective.beta": 0.5, "optim.lr": 0.01})
    make_run(tmp_path / "5", settings={"objective.beta": 0.5, "optim.lr": 0.02})
    assert {group.objective for group in compare(tmp_path).groups} == {"dpo beta=0.1", "dpo beta=0.5"}


def test_numbers_of_a_search_are_said_with_four_digits_that_tell_them_apart(tmp_path: Path) -> None:
    drawn = (0.0012994814172947254, 3.6350844614016147e-05, 0.0003)
    for number, rate in enumerate(drawn):
        make_run(tmp_path / str(number), settings={"optim.lr": rate, "objective.beta": 0.1})
    shown = {group.shown["optim.lr"] for group in compare(tmp_path).groups}
    assert shown == {"0.001299", "3.635e-05", "0.0003"}
    make_run(tmp_path / "close", settings={"optim.lr": 0.0012994814172947256, "objective.beta": 0.1})
    shown = {group.shown["optim.lr"] for group in compare(tmp_path).groups}
    assert shown == {*map(str, drawn), "0.0012994814172947256"}


def test_objectives_are_counted_and_not_lines(mixed: Path, tmp_path: Path) -> None:
    """Seven lines without calibration are of dpo, and one of simpo, which does not fall."""
    comparison = compare(mixed)
    assert "1 of 2 objectives pushes" in headline(make_lines(comparison), comparison)
    for number in range(8):
        make_run(tmp_path / str(number), settings={"optim.lr": 0.1 / (number + 1)})
    comparison = compare(tmp_path)
    said = headline(make_lines(comparison), comparison)
    assert "dpo pushes the held-out chosen responses down in 8 of 8 settings" in said


def test_a_difference_of_rounding_is_none_however_small_its_p(tmp_path: Path) -> None:
    """Every pair has changed by 6e-7 nats more than under off: p is 0, and nothing has happened."""
    make_run(tmp_path / "off")
    more = (-1.0 + 6e-7, 1.0 + 6e-7, 2.0 + 6e-7, -4.0 + 6e-7)
    make_run(tmp_path / "on", "dpo", "on", change=(more, REJECTED))
    comparison = compare(tmp_path)
    lines = make_lines(comparison)
    assert abs(comparison.groups[1].differences["chosen"].mean) < 1e-6
    (said,) = sentences(lines, comparison)
    assert said.startswith("dpo: off -0.50 nats; on -0.50, no difference; at ")
    assert make_view(lines, comparison).columns[-1].text(lines[1], "±") == "-"


TABLES = {
    "a.csv": "run,win_rate,judge\nruns/dpo-on,0.75,x\ndpo-off,0.5,x\nother,1,x\n",
    "a.tsv": "win_rate\tname\n0.75\tdpo-on\n0.5\tdpo-off\n",
    "a.jsonl": '{"run": "dpo-on", "win_rate": 0.75}\n{"run": "dpo-off", "win_rate": 0.5}\n',
    "a.json": '{"dpo-on": {"win_rate": 0.75}, "dpo-off": {"win_rate": 0.5}}',
}


@pytest.mark.parametrize("name", TABLES)
def test_any_table_is_joined_by_the_runs_names(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text(TABLES[name])
    words = [
        "compare",
        str(mixed),
        "--with",
        str(tmp_path / name),
        "--columns",
        "run,optim.lr,win_rate,chosen",
    ]
    assert cli.dispatch([*words, "--csv"]) == 0
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert (rows["dpo-on"]["win_rate"], rows["dpo-off"]["win_rate"], rows["lora"]["win_rate"]) == (
        "0.75",
        "0.5",
        "",
    )
    assert rows["fast"]["optim.lr"] == "0.001"
    assert list(rows["lora"]) == ["run", "optim.lr", "win_rate", "chosen"]
    assert cli.dispatch([*words, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert next(cell for cell in cells if cell["run"] == "dpo-on")["win_rate"] == 0.75


@pytest.mark.parametrize(
    ("file", "text", "words", "said"),
    [
        ("a.csv", "run,win_rate\nnobody,1\n", [], "its column run names none of the runs (it has nobody)"),
        ("a.csv", "run,chosen\ndpo-on,1\n", [], "chosen: is a column of the table already"),
        ("a.csv", "", [], "has no rows"),
        ("a.json", "[1", [], "cannot be read"),
        ("a.xlsx", "x", [], "must be a .csv, .tsv, .json or .jsonl file"),
        (
            "a.csv",
            "run,x\ndpo-on,1\n",
            ["--columns", "run,lr"],
            "--columns lr: no such column; choose from run,",
        ),
    ],
)
def test_a_table_or_a_column_that_cannot_be_is_one_line(
    mixed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    text: str,
    words: list[str],
    said: str,
) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", str(mixed), "--with", str(tmp_path / file), *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
