"""Where cells are going to run: what that adds to their configs. Loads nothing before a cell is resolved."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig
    from rcpo.config.schema import Config


class Target(Protocol):
    """Where cells run. Its repr says all that it adds."""

    words: Sequence[str]
    """Overrides of every cell, after the sweep's own."""

    def resolve(self, config: "Config") -> "ResolvedConfig":
        """`config` without nulls, for the machines that will run it."""


class Here:
    """This machine."""

    words: Sequence[str] = ()

    def __repr__(self) -> str:
        return "Here()"

    def resolve(self, config: "Config") -> "ResolvedConfig":
        from rcpo.config.resolve import resolve

        return resolve(config, None)
