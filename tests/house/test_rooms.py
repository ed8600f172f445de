"""The order of rooms: imports point down, no module needs itself, and every room says what it owns."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rcpo

PACKAGE = Path(rcpo.__file__).parent
ORDER: list[set[str]] = [
    {"common"},
    {"objectives"},
    {"config"},
    {"ranks"},
    {"method"},
    {"records"},
    {"data"},
    {"builtin"},
    {"models"},
    {"engine"},
    {"runs"},
    {"reference"},
    {"monitor"},
    {"training"},
    {"evaluation"},
    {"bench", "sweep", "quality"},
    {"comparison"},
    {"report"},
    {"launch"},
    {"commands", "library"},
]
"""Bottom first; rooms of one set do not know each other. Modules beside the rooms stand above all of them."""
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(tree: ast.AST, everywhere: bool) -> Iterator[str]:
    """Modules of rcpo that a file imports; `everywhere`: inside functions and for types, too."""
    statements = ast.walk(tree) if everywhere else iter(tree.body)  # type: ignore[attr-defined]
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("rcpo."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rcpo":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def room_of(module: str) -> str | None:
    """None for a module beside the rooms, such as rcpo.cli."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else None


def test_every_folder_is_a_room_of_the_order() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(LEVEL)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    own = room_of(module)
    if own is None:
        return
    wrong = [
        target
        for target in imported(ast.parse(MODULES[module].read_text()), everywhere=True)
        if (room := room_of(target)) not in (None, own) and LEVEL[str(room)] >= LEVEL[own]
    ]
    assert not wrong, f"{module} imports from above: {wrong}"


def test_no_module_needs_itself() -> None:
    """By imports at the top of files: a circle of them fails, or works by accident of who comes first."""
    needs = {
        module: [each for each in imported(ast.parse(path.read_text()), everywhere=False) if each in MODULES]
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for target in needs[module]:
                if target != "rcpo" and not module.startswith(f"{target}."):  # a package may gather its files
                    follow(target, [*way, module])
            done.add(module)

    for module in MODULES:
        follow(module, [])


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_a_room_says_what_it_owns_and_what_not(room: str) -> None:
    said = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    words = set(said.lower().replace(".", " ").replace(",", " ").split())
    assert words & {"not", "nothing", "no", "never", "neither"}, f"rcpo/{room}: what does it not own?"


def test_few_modules_lie_beside_the_rooms() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= {"__init__.py", "cli.py", "incentives.py"}
