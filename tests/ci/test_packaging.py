"""The built wheel, installed alone and run elsewhere: conf/ and the embedded model come with it.

The fresh environment sees this one's libraries through a .pth file, so that nothing is downloaded; rcpo
itself comes from the wheel, which the tests check.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from helpers import ROOT

WEIGHTS = "rcpo/builtin/tiny/model.safetensors"
WANTED = (
    "conf/config.yaml", "conf/objective/simpo.yaml", "conf/calibration/on.yaml", "rcpo/cli.py", WEIGHTS,
    "conf/cluster/example.yaml", "slurm/array.sbatch",
    "rcpo/builtin/tiny/config.json", "rcpo/builtin/tiny/tokenizer.json",
    "rcpo/builtin/tiny/tokenizer_config.json", "rcpo/builtin/tiny_vision/model.safetensors",
    "rcpo/builtin/tiny_vision/processor_config.json", "rcpo/builtin/tiny_vision/chat_template.jinja",
)  # fmt: skip
"""Paths in the source tree."""
SUFFIXES = {
    ".py",
    ".yaml",
    ".json",
    ".safetensors",
    ".typed",
    ".sbatch",
    ".css",
    ".js",
    ".j2",
    ".md",
    ".jinja",
}
"""All that a wheel holds of rcpo, beside its own dist-info."""

pytestmark = pytest.mark.ci("packaging")


def run(words: list[object], cwd: Path) -> str:
    """Output of a command that must succeed, with no variable that helps it to find sources."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist, built from the source tree without a network."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", out, ROOT], out)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ folder of a fresh environment that has the wheel."""
    venv = tmp_path_factory.mktemp("venv") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", venv], built)
    python = venv / "bin/python"
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], built).strip()
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", "--quiet", wheel], built)
    # A plain path: .pth files inside that folder, an editable install's among them, are not followed.
    Path(site, "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


def test_the_wheel_holds_the_package_conf_and_model_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in WANTED:
        assert (f"rcpo/{path}" if path.startswith(("conf/", "slurm/")) else path) in names
    own = [name for name in names if not name.startswith("rcpo-")]
    assert all(name.startswith("rcpo/") for name in own)
    assert {Path(name).suffix for name in own} <= SUFFIXES
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 5e6
    shipped = {f"rcpo/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name for name in own if name.startswith("rcpo/conf/")} == {*shipped, "rcpo/conf/README.md"}
    assert {Path(name).name for name in own if name.endswith(".md")} == {"README.md"}


def test_the_sdist_holds_sources_and_tests_and_nothing_else(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert {*WANTED, "LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"} <= set(names)
    top = {name.split("/")[0] for name in names}
    assert top <= {"rcpo", "conf", "sweeps", "slurm", "tests", "README.md", "LICENSE", "pyproject.toml",
                   "PKG-INFO", ".gitignore"}  # fmt: skip
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheel_trains_from_any_folder(installed: Path, tmp_path: Path) -> None:
    """Two steps with the wheel's own conf/ and model, and a model folder at the end."""
    where = run([installed / "python", "-c", "import rcpo.common.conf as c; print(c.conf_dir())"], tmp_path)
    assert where.strip().startswith(str(installed.parent))
    words = ["objective=simpo", "calibration=on", "train.steps=2", "data.train_pairs=32"]
    output = run([installed / "rcpo", "train", *words, "name=wheel"], tmp_path)
    assert "chosen" in output
    assert (tmp_path / "runs/wheel/final/model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    frozen = (tmp_path / "runs/wheel/config.yaml").read_text()
    assert str(ROOT) not in frozen


def test_the_wheel_completes_and_tells_its_version(installed: Path, tmp_path: Path) -> None:
    version = run([installed / "rcpo", "--version"], tmp_path)
    assert version == run([installed / "python", "-m", "rcpo.cli", "--version"], tmp_path)
    assert version.startswith("rcpo ")
