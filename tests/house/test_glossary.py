"""The words that rcpo/README.md says not to say are not in the names of the code.

A word is looked for in identifiers alone, split at underscores and capitals. Prose is read by people.
"""

import ast
import re
from collections.abc import Iterator

from helpers import ROOT
from helpers.readmes import table_rows

HELD: dict[str, dict[str, str]] = {
    "sample": {
        "SAMPLE_WEIGHTS": "the config key objective.sample_weight",
        "sample_weight": "the config key objective.sample_weight",
        "sample": "Python's random.sample",
    },
    "example": {
        "EXAMPLE": "of a command line or a section of a config",
        "EXAMPLES": "of command lines",
        "example": "of a value to type",
    },
    "winner": {},
    "loser": {},
    "reward": {},
    "logps": {
        "token_logps": "of single tokens; z is their sum",
        "ref_token_logps": "of single tokens",
        "grad_token_logps": "of single tokens",
        "plain_token_logps": "of single tokens",
        "response_token_logps": "of single tokens",
        "_precompute_ref_logps": "TRL's name",
    },
    "factor": {},
    "controller": {},
    "iteration": {},
    "validation": {"ValidationError": "pydantic's name"},
    "test": {},
    "experiment": {},
}
"""Word to the identifiers that may have it, each with its reason."""
OTHER_MEANINGS = {
    "chosen": "the response; only for an option it is the wrong word",
    "half": "of a width or a window",
    "base": "a class's, a baseline, the model below an adapter",
    "initial": "of a state before the first step",
    "log": "of the log ratio, which is the position before calibration",
    "ratio": "of the log ratio, and of speeds",
    "weight": "of a pair, and a model's weights",
    "gradient": "of the loss",
    "score": "the gradient of z; a pair score says so",
    "statistics": "what a calibrator sees of a step, and an objective of a batch",
    "evaluation": "of held-out pairs",
    "scale": "of a vector",
    "job": "of SLURM",
    "cell": "of a sweep",
    "record": "a line of data",
}
"""Words that are right for something else, so that no test of names can hold them."""
FILLERS = {
    "and",
    "in",
    "prose",
    "for",
    "an",
    "option",
    "the",
    "responses",
    "alone",
    "model",
    "set",
    "merged",
    "seeds",
}


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that a file makes or uses, with their lines."""
    for node in ast.walk(tree):
        name = (
            getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
            or getattr(node, "asname", None) or getattr(node, "name", None)
        )  # fmt: skip
        if isinstance(name, str):
            yield name.rpartition(".")[2], getattr(node, "lineno", 0)


def words_of(name: str) -> set[str]:
    """In small letters, without the s of a plural: HeldOutRows has held, out and row."""
    found = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return found | {word.removesuffix("s") for word in found}


def test_a_word_is_found_in_a_name() -> None:
    assert {"held", "out", "row"} <= words_of("HeldOutRows")
    assert {"num", "sample"} <= words_of("NUM_SAMPLES")
    source = "import a.winner\nfrom b import c as loser\ndef reward(sample): self.factor = example(test=1)"
    found = {name for name, _ in identifiers(ast.parse(source))}
    assert {"winner", "loser", "reward", "sample", "factor", "example", "test"} <= found


def test_every_word_of_the_glossary_is_held_or_has_another_meaning() -> None:
    column = [cells[3] for cells in table_rows(ROOT / "rcpo/README.md", "| word | what it is")]
    said = {word for cell in column for word in re.findall(r"[a-z]+", cell)} - FILLERS
    assert said == set(HELD) | set(OTHER_MEANINGS)


def test_the_code_does_not_say_them() -> None:
    used = set()
    wrong = []
    for path in sorted((ROOT / "rcpo").rglob("*.py")):
        for name, line in identifiers(ast.parse(path.read_text())):
            for word in words_of(name) & set(HELD):
                used.add((word, name))
                if name not in HELD[word]:
                    wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}: do not say {word}")
    assert wrong == []
    # An exception that nothing needs any more goes.
    assert {(word, name) for word, names in HELD.items() for name in names} <= used


def test_files_do_not_say_them() -> None:
    names = [path.stem for path in (ROOT / "rcpo").rglob("*.py")]
    assert [name for name in names if words_of(name) & set(HELD)] == []
