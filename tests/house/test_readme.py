"""The READMEs say what is so: short lines, links that lead somewhere, files that exist, tables of what there
is.

Their commands are in `tests/processes/test_readme_commands.py`.
"""

import ast
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rcpo
from helpers import ROOT
from helpers.forked import in_a_fork
from helpers.plain_loop import summed
from helpers.readmes import anchors, code, links, readmes, spans, table_rows, text_of
from helpers.tiny_models import MODELS, make_pairs
from rcpo.common import conf
from rcpo.common.conf import conf_dir
from rcpo.config.keys import page
from rcpo.data.tokenize import TokenizedPair
from rcpo.method.advice import AGAINST, DISPLACE, DO_NOT, LIFT, STARTS, after_a_fall
from rcpo.monitor.model_card import formula
from rcpo.objectives import REGISTRY, load_objective, pairwise
from rcpo.objectives.own import import_own
from rcpo.sweep.definition import read_definition

FRONT = ROOT / "README.md"
INSIDE = ROOT / "rcpo/README.md"
OBJECTIVES, LIBRARY = ROOT / "rcpo/objectives/README.md", ROOT / "rcpo/library/README.md"
COLUMNS, LINES, NUM_WORDS = 100, 200, 20
READERS_OWN = ("conf/objective/mine.yaml",)
"""Files that the reader is told to write."""

each_readme = pytest.mark.parametrize("readme", readmes(), ids=lambda file: str(file.relative_to(ROOT)))


def test_the_front_page_is_short() -> None:
    lines = text_of(FRONT).splitlines()
    assert len(lines) <= LINES
    assert [line for line in lines if len(line) > COLUMNS] == []


@each_readme
def test_prose_and_commands_are_wrapped(readme: Path) -> None:
    """Tables are as wide as they must be."""
    lines = text_of(readme).splitlines()
    assert [line for line in lines if len(line) > COLUMNS and not line.startswith("|")] == []


def test_what_to_start_with_is_said_once() -> None:
    """The front page's table and a fallen run's last line come from one place."""
    section = text_of(FRONT).split("## Which calibration to start with\n\n")[1]
    rows = section.split("\n\n")[0].splitlines()[2:]
    assert rows == [f"| {' | '.join(start)} |" for start in STARTS]
    table = {start.case: start.words for start in STARTS}
    assert table["dpo, simpo, ipo and the like"] == f"`calibration={AGAINST}`" == "`calibration=balance`"
    assert table["dil_bce, ddro"] == "`calibration=off`"
    for objective in (*DISPLACE, *LIFT, *DO_NOT):
        assert f"calibration={AGAINST} is made against it" in after_a_fall("off", objective)


def test_the_two_commands_are_there() -> None:
    lines = "".join(code(FRONT, "sh")).splitlines()
    assert "pip install -e . && rcpo train objective=simpo calibration=on" in lines
    assert "pip install -e '.[test]' && pytest" in lines


@each_readme
def test_links_lead_somewhere(readme: Path) -> None:
    for target in links(readme):
        if target.startswith("https://arxiv.org/"):
            continue
        path, _, anchor = target.partition("#")
        file = (readme.parent / path).resolve() if path else readme
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_readme_is_linked_from_the_front_page() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links(FRONT)}
    assert set(readmes()) - {FRONT} <= linked


def test_the_configuration_is_what_the_schema_says() -> None:
    assert text_of(ROOT / "conf/README.md") == page(), "type: python -m rcpo.config.keys > conf/README.md"
    assert "no option has it" not in page()


def test_the_objectives_table_is_the_registry() -> None:
    """One line an objective: its formula, its defaults and whether it needs a reference."""
    table = table_rows(OBJECTIVES, "| name | loss per pair")
    found = {cells[0].strip("`"): cells[1:4] for cells in table}
    assert sorted(found) == sorted(REGISTRY)
    for name, (loss, defaults, reference) in found.items():
        objective = load_objective(name)
        assert loss == formula(objective).replace("|", "\\|").split(", per pair")[0]
        params = ", ".join(f"{key} {value}" for key, value in objective.params().items())
        assert defaults == ("terms" if name == "mix" else params)
        assert reference == ("yes" if objective.needs_reference else "no")
    assert f"any of {len(REGISTRY)} objectives" in " ".join(text_of(FRONT).split())


def test_every_metric_named_is_written() -> None:
    """First keys of the lines of the metrics table are ones that rcpo writes."""
    source = "".join(path.read_text() for path in (ROOT / "rcpo").rglob("*.py"))
    table = table_rows(ROOT / "rcpo/runs/README.md", "| key | meaning")
    keys = [cells[0].split("`")[1] for cells in table]
    assert len(keys) > 10
    for key in keys:
        assert f'"{key}"' in source or key == "population/cosine", key


@each_readme
def test_every_file_named_exists(readme: Path) -> None:
    """Paths from the top of the repository or, in rcpo/README.md, from rcpo/."""
    paths = {span for span in spans(readme) if re.fullmatch(r"(rcpo|conf|tests|sweeps|slurm)/[\w./-]+", span)}
    if readme == INSIDE:
        paths |= {f"rcpo/{span}" for span in spans(readme) if re.fullmatch(r"[a-z]+/\w+\.py", span)}
    assert [path for path in sorted(paths) if path not in READERS_OWN and not (ROOT / path).exists()] == []


def test_the_drawn_rooms_are_the_rooms() -> None:
    (drawing,) = code(INSIDE, "text")
    drawn = [room for line in drawing.splitlines() for room in re.split(r" {2,}", line[:26].strip()) if room]
    there = [file.parent.name for file in (ROOT / "rcpo").glob("*/__init__.py")]
    assert sorted(drawn) == sorted(there)
    table = table_rows(INSIDE, "| room | its files")
    assert {re.sub(r"\[(\w+)\].*", r"\1", cells[0]) for cells in table} == set(there)
    for room, files in table:
        folder = ROOT / "rcpo" / re.sub(r"\[(\w+)\].*", r"\1", room)
        for name in re.findall(r"`(\w+\.py)`", files):
            assert (folder / name).is_file() or (folder.parent / name).is_file(), f"{room}: {name}"


def test_the_glossary_has_twenty_words() -> None:
    words = [cells[0] for cells in table_rows(INSIDE, "| word | what it is")]
    assert len(words) == len(set(words)) == NUM_WORDS


@each_readme
def test_python_is_python(readme: Path) -> None:
    for block in code(readme, "python"):
        ast.parse(block)


def test_an_objective_of_ones_own_is_registered_from_its_file(tmp_path: Path) -> None:
    """The front page's, and the one with parameters."""
    for readme in (FRONT, OBJECTIVES):
        (own,) = [block for block in code(readme, "python") if block.startswith("# my_losses.py")]
        file = tmp_path / readme.parent.name / "my_losses.py"
        file.parent.mkdir()
        file.write_text(own)

        def work(named: str = str(file)) -> None:
            assert list(import_own(named).entries) == ["mine"]
            assert formula(load_objective("mine")).startswith("softplus(-")

        in_a_fork(work)


def test_the_objective_to_ship_works_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its function beside the others of a family, its YAML file, and the lines that use an objective."""
    _, function, usage = code(OBJECTIVES, "python")
    (config,) = code(OBJECTIVES, "yaml")
    shutil.copytree(conf_dir(), tmp_path / "conf")
    (tmp_path / "conf/objective/mine.yaml").write_text(config)
    monkeypatch.setattr(conf, "conf_dir", lambda: tmp_path / "conf")
    names: dict[str, Any] = {}
    exec(usage, names)
    assert names["loss"].shape == names["d_w"].shape == (1,)

    def work() -> None:
        exec(function, vars(pairwise))
        objective = load_objective("mine")
        assert objective.params() == {"beta": 0.1}
        assert formula(objective) == "softplus(-beta mt)"
        assert objective(names["pair"]).shape == (1,)

    in_a_fork(work)


@pytest.mark.parametrize("readme", [FRONT, LIBRARY], ids=["front", "library"])
def test_the_loop_with_a_calibrator_trains(readme: Path) -> None:
    """Two steps of two micro-batches, on a model that ties its head."""
    (loop,) = [block for block in code(readme, "python") if block.startswith("calibrator = ")]
    model = MODELS["llama-tied"]()
    pairs = make_pairs(8, seed=3)

    def of(batch: list[TokenizedPair]) -> SimpleNamespace:
        with torch.no_grad():
            z = summed(model, batch)
        len_w, len_l = (
            torch.tensor([len(side.input_ids) - side.num_prompt for side in sides]).float()
            for sides in ([pair.chosen for pair in batch], [pair.rejected for pair in batch])
        )
        return SimpleNamespace(pairs=batch, ref_w=z.z_w, ref_l=z.z_l, len_w=len_w, len_l=len_l)

    def summed_logprobs(model: Any, batch: SimpleNamespace) -> tuple[Tensor, Tensor]:
        z = summed(model, batch.pairs)
        return z.z_w, z.z_l

    names: dict[str, Any] = {
        "rcpo": rcpo, "model": model, "summed_logprobs": summed_logprobs,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [[of(pairs[0:2]), of(pairs[2:4])], [of(pairs[4:6]), of(pairs[6:8])]],
    }  # fmt: skip
    exec(loop, names)
    assert names["row"]["step"] == 2
    assert names["row"]["calibration/alpha"] != 1


def test_the_sweep_file_of_the_readme_is_one(tmp_path: Path) -> None:
    grid, search = code(ROOT / "sweeps/README.md", "yaml")
    (tmp_path / "mine.yaml").write_text(grid)
    definition = read_definition(str(tmp_path / "mine.yaml"))
    assert [len(values) for values in definition.axes.values()] == [3, 2, 3]
    (tmp_path / "mine.yaml").write_text(search)
    definition = read_definition(str(tmp_path / "mine.yaml"))
    assert (list(definition.ranges), definition.search is not None) == (["optim.lr"], True)
