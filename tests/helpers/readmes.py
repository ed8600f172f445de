"""What the README files of this repository print: commands, code, links, anchors."""

import re
import shlex
from pathlib import Path

from helpers import ROOT

PROGRAMS = ("rcpo", "pip", "python", "pytest", "torchrun", "sbatch", "eval")
"""With what a command of a README begins."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def readmes() -> list[Path]:
    """All of them, the front page first."""
    tops = ("rcpo", "conf", "sweeps", "slurm", "tests")
    return [ROOT / "README.md", *sorted(file for top in tops for file in (ROOT / top).rglob("README.md"))]


def text_of(readme: Path) -> str:
    return readme.read_text(encoding="utf-8")


def code(readme: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [block for name, block in _FENCE.findall(text_of(readme)) if name == language]


def prose(readme: Path) -> str:
    """The text without its fenced blocks."""
    return _FENCE.sub("", text_of(readme))


def spans(readme: Path) -> list[str]:
    """What stands between backticks in the prose, each on one line."""
    found = re.findall(r"`([^`]+)`", prose(readme))
    return [" ".join(span.replace("\\|", "|").split()) for span in found]


def table_rows(readme: Path, head: str) -> list[list[str]]:
    """Cells of the table that begins with `head`."""
    lines = text_of(readme).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(head)) + 2
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return table


def commands(readme: Path) -> list[str]:
    """Every command that a reader could type, in order: lines of sh blocks, then commands in the prose. A
    program's name alone, or with its first word alone, is no command."""
    lines = [
        part.strip()
        for block in code(readme, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        for part in _without_comment(line).split(" && ")
    ]
    inline = [span for span in spans(readme) if span.split()[0] in PROGRAMS and len(span.split()) > 2]
    return [" ".join(line.split()) for line in (*lines, *inline) if line]


def all_commands() -> list[str]:
    """Of all READMEs, each once."""
    return list(dict.fromkeys(command for readme in readmes() for command in commands(readme)))


def _without_comment(line: str) -> str:
    return re.sub(r"\s+# .*", "", line)


def words(command: str) -> list[str]:
    return shlex.split(command)


def links(readme: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(readme))


def anchors(readme: Path) -> set[str]:
    """What a link to a heading may say, as GitHub makes it."""
    heads = re.findall(r"^#+ (.*)$", prose(readme), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()) for head in heads]
    return {head.replace(" ", "-") for head in kept}
