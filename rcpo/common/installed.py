"""Entry points of installed packages: names that other packages give to rcpo, and the code behind them.

Names are read from the packages' metadata alone; code is imported when somebody asks for that very name.
"""

from importlib.metadata import entry_points

OBJECTIVES = "rcpo.objectives"
"""The group of objectives: `my_loss = "my_package.losses"`, a module that registers one of that name."""


def names_in(group: str) -> list[str]:
    """All names of a group, sorted; nothing is imported."""
    return sorted({point.name for point in entry_points(group=group)})


def load_from(group: str, name: str) -> bool:
    """Import what stands behind the name; whether there is such a name. What it raises is raised."""
    found = [point for point in entry_points(group=group) if point.name == name]
    for point in found:
        point.load()
    return bool(found)
