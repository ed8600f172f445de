"""The grid as a W&B sweep, for those who prefer W&B's agents: every agent run is an `rcpo train`.

W&B knows values of single keys and their whole product: a sweep with more than that cannot be one.
"""

import math
from typing import Any

import yaml

from rcpo.common.errors import UserError
from rcpo.sweep.definition import Definition
from rcpo.sweep.start import start_of


def wandb_sweep(definition: Definition) -> str:
    """YAML for `wandb sweep`. Raises UserError for what W&B's grids cannot say."""
    if definition.exclude or definition.include:
        raise UserError("--wandb-sweep: W&B's grids know no exclude and no include; remove them")
    every = [word for values in definition.axes.values() for value in values for word in value.words]
    if definition.first or start_of([*every, *definition.overrides]) is not None:
        raise UserError("--wandb-sweep: W&B's agents know no cells that start from others; remove them")
    parameters: dict[str, Any] = {}
    for axis, values in definition.axes.items():
        for value in values:
            if value.words != (f"{axis}={value.label}",):
                raise UserError(
                    f"--wandb-sweep: {axis}: {value.label} stands for several overrides, and W&B's grids "
                    "know single values only"
                )
        parameters[axis] = {"values": [_number_or_text(value.label) for value in values]}
    tree = {
        "name": definition.name,
        "method": "grid",
        "metric": {"name": "eval/displacement/chosen", "goal": "maximize"},
        "parameters": parameters,
        "command": ["${env}", "rcpo", "train", *definition.overrides, "${args_no_hyphens}"],
    }
    return yaml.safe_dump(tree, sort_keys=False, width=200)


def _number_or_text(label: str) -> int | float | str:
    """As a number where it is one, so that W&B can draw it; null, true and off stay text, as typed."""
    for kind in (int, float):
        try:
            value = kind(label)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return label
