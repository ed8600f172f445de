"""What tests of the kind ci need beside rcpo's test extra: `@pytest.mark.ci(KIND, needs=TOOL)`.

`python tests/helpers/tools.py` prints the Debian packages of those that are not here, for `.ci/run`, which
installs rcpo's other extras by itself.
"""

import importlib.util
import os
import shutil

PROGRAMS = {
    "slurm": ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun"),
    "chromium": ("chromium",),
    "fish": ("fish",),
    "zsh": ("zsh",),
}
"""Of a tool."""
PACKAGES = {
    "slurm": ("slurmctld", "slurmd", "slurm-client", "munge"),
    "chromium": ("chromium", "fonts-liberation"),
    "fish": ("fish",),
    "zsh": ("zsh",),
}
"""Debian's packages of a tool."""


EXTRAS = {
    "bitsandbytes": "quantization",
    "lm_eval": "evaluate",
    "trl": "bench",
    "alpaca_eval": "peers",
    "fastchat": "peers",
    "num2words": "smolvlm",
}
"""Python packages of which no other test has need, and rcpo's extra that brings each."""


def is_here(tool: str) -> bool:
    if tool in EXTRAS:
        return importlib.util.find_spec(tool) is not None
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return all(shutil.which(program, path=path) for program in PROGRAMS[tool])


def missing(tool: str) -> str | None:
    """Why a test that needs the tool cannot run here, in one line with what to type."""
    if tool in EXTRAS and not is_here(tool):
        return f"{tool} is not here; type pip install -e '.[{EXTRAS[tool]}]' (.ci/run does it)"
    if not is_here(tool):
        return f"{tool} is not here; type apt-get install {' '.join(PACKAGES[tool])} (.ci/run does it)"
    if tool == "slurm" and os.geteuid() != 0:
        return "a private SLURM needs root; type sudo pytest -m ci"
    return None


if __name__ == "__main__":
    print(*(package for tool, packages in PACKAGES.items() if not is_here(tool) for package in packages))
