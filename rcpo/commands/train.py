"""`rcpo train [GROUP=OPTION] [KEY=VALUE] ...`: compose, validate, freeze, start the workers."""

from typing import TYPE_CHECKING

from rcpo.config.compose import compose, only_prints

if TYPE_CHECKING:
    from rcpo.config.schema import Config


def run(words: list[str]) -> int:
    """Train as configured; returns the exit code. Raises UserError for bad input, before anything is
    written."""
    if only_prints(words) and compose(words) is None:
        return 0
    from rcpo.launch import start

    return start(lambda: prepare(words))


def prepare(words: list[str]) -> "Config | None":
    """The resolved config of these words, or None when Hydra only printed something."""
    from rcpo.config.resolve import resolve
    from rcpo.config.schema import validate
    from rcpo.distributed import joined_world_size

    tree = compose(words)
    return None if tree is None else resolve(validate(tree), joined_world_size())
