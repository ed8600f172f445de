"""Which calibration to start with, said once: README.md's table and the last line of a run that fell come
from here. The evidence is in rcpo/method/README.md.
"""

from typing import NamedTuple


class Start(NamedTuple):
    """A line of the table."""

    case: str
    words: str
    """What to type."""
    so_far: str
    """What it did, in the runs of rcpo/method/README.md."""


DISPLACE = ("dpo", "simpo", "ipo")
"""Objectives that were seen to push the chosen response down without calibration."""
LIFT = ("cpo", "orpo", "rpo")
"""Objectives whose likelihood term was seen to lift both sides, by 6 nats and more on real weights."""
DO_NOT = ("dil_bce", "ddro")
"""Objectives that were seen to do neither on the default model; on SmolLM2 `balance` changed little."""
AGAINST = "balance"
"""The calibration to start with where the chosen response falls."""

STARTS = (
    Start(
        f"{', '.join(DISPLACE)} and the like",
        f"`calibration={AGAINST}`",
        "chosen up, rejected down, on SmolLM2 too",
    ),
    Start(f"{', '.join(LIFT)}: both rise", f"`calibration={AGAINST}`", "the same at the end; orpo late"),
    Start(", ".join(DO_NOT), "`calibration=off`", "rose by themselves; on SmolLM2 `balance` changed nothing"),
    Start("dpo; no passes for measuring", "`calibration=feedback`", "held the chosen one up"),
    Start(
        "short sure answers; the rejected may rise", "`calibration=exact` or `on`", "lifted the chosen most"
    ),
    Start("you only want to look", "`calibration=off metrics.geometry_every=10`", "changes no bit"),
)


def after_a_fall(calibration: str, objective: str) -> str:
    """What to do about chosen responses that fell under `calibration`, as the end of a sentence."""
    if calibration == "off":
        text = f"calibration={AGAINST} is made against it"
        if objective in DO_NOT:
            return f"{text}, though it was not seen to help {objective} on real weights"
        return f"{text}, though {objective} was not seen to need one" if objective in LIFT else text
    text = f"calibration={calibration} did not prevent it here"
    return text if calibration == AGAINST else f"{text}; calibration={AGAINST} may"
