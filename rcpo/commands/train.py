"""`rcpo train [GROUP=OPTION] [KEY=VALUE] ...`: compose, validate, freeze, start the workers."""

from typing import TYPE_CHECKING

import rcpo
from rcpo.config.compose import compose, only_prints

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig

OVERWRITE = "--overwrite"
"""The one flag of rcpo's own; Hydra does not see it."""


def run(words: list[str]) -> int:
    """Train as configured; returns the exit code. Raises UserError for bad input, before anything is
    written."""
    if "--version" in words:
        print(f"rcpo {rcpo.__version__}")
        return 0
    composed = [word for word in words if word != OVERWRITE]
    if only_prints(composed) and compose(composed) is None:
        return 0
    from rcpo.launch.start import start

    return start(lambda: prepare(composed), overwrite=OVERWRITE in words)


def prepare(words: list[str]) -> "ResolvedConfig | None":
    """The resolved config of these words, or None when Hydra only printed something."""
    from rcpo.config.resolve import resolve
    from rcpo.config.validate import validate
    from rcpo.ranks.environment import joined_world_size

    tree = compose(words)
    return None if tree is None else resolve(validate(tree), joined_world_size())
