"""conf/README.md: every group, option and key, from the schema and the YAML files.

`python -m rcpo.config.keys > conf/README.md` writes it; a test compares. Values are those of conf/*.yaml,
meanings and ranges those of `rcpo.config.schema`. Composes nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rcpo.common.conf import conf_dir, option_tree
from rcpo.config.meanings import comments, field_docstrings, first_comment, leaves, shown
from rcpo.config.schema import Config
from rcpo.objectives import REGISTRY, config_key

INTRO = """# Configuration: every group, option and key

<!-- `python -m rcpo.config.keys > conf/README.md` writes this; change the schema or the YAML. -->

`rcpo train` and `rcpo score` take two kinds of words. GROUP=OPTION selects a file of this folder:
`calibration=on` is `conf/calibration/on.yaml`. KEY=VALUE sets one value: `train.steps=300`.

```sh
rcpo train --help                              # this, for the options that your words select
rcpo train objective=simpo --plan              # what your words would do: steps, lr, memory, ...
rcpo train objective=simpo --cfg job           # what they come to, as YAML
rcpo train objective=simpo --cfg job --resolve # and what rcpo decides of them
rcpo train --config-dir DIR objective=mine     # an option of your own: DIR/objective/mine.yaml
```

- A default stands once, in a YAML file of this folder. Where a config lacks a key, such as one that
  an older rcpo froze, rcpo reads the value there too. Only objectives have theirs twice, here and
  in Python, where they work without a config; a test holds them equal.
- **null** means that rcpo decides. **???** means that you must give the value.
- `experiment=NAME` sets options and keys together. Copy `conf/experiment/example.yaml` to
  `DIR/experiment/NAME.yaml`. The command line still wins.
- In a YAML file, quote `"off"` and `"on"`: YAML 1.1 reads them as false and true.
- rcpo checks the whole config once, before it writes anything. An unknown key, a wrong type or an
  impossible combination is one line and exit code 2.
- `conf/cluster/` has SLURM profiles. `rcpo sweep` reads them, `rcpo train` does not:
  [slurm/README.md](../slurm/README.md).
"""
GROUPS = """## Groups and options

The option in bold is the default.

| group | option | what it is |
|---|---|---|
"""
OBJECTIVE = """Every objective accepts these, beside its own parameters:

| key | default | meaning |
|---|---|---|
"""
PARAMETERS = """
Its own parameters. [rcpo/objectives/README.md](../rcpo/objectives/README.md) has the formulas.

| objective | key | default | meaning |
|---|---|---|---|
"""
TABLE = """| key | default | takes | meaning |
|---|---|---|---|
"""
DECIDED_BY_OPTION = (
    "calibration.name", "data.source", "evaluation.name", "optim.name", "reference.name", "tracking.name",
)  # fmt: skip
"""Keys that the selected option sets; they are not for users."""


def page() -> str:
    """The whole text."""
    folder = conf_dir()
    root = option_tree(folder / "config.yaml")
    defaults = _default_options(root)
    parts = [INTRO, "\n", GROUPS, *_group_lines(folder, defaults)]
    schema = TypeAdapter(Config).json_schema()
    sections = [name for name in schema["properties"] if "$ref" in _plain(schema["properties"][name])]
    parts += ["\n## Keys that stand alone\n\n", TABLE]
    for name in schema["properties"]:
        if name not in (*sections, "objective"):
            parts.append(_key_line(name, _code(root.get(name)), schema["properties"][name], folder))
    parts += ["\n## objective\n\n", OBJECTIVE, *_shared_objective_lines(folder)]
    parts += [PARAMETERS, *_parameter_lines(folder)]
    for name in sections:
        values = _values(name, folder, root, defaults)
        fields = dict(_fields(name, schema["properties"][name], schema["$defs"]))
        parts += [f"\n## {name}\n\n", TABLE]
        parts += [
            _key_line(key, values.get(key, "no option has it"), field, folder)
            for key, field in fields.items()
            if key not in DECIDED_BY_OPTION
        ]
    return "".join(parts)


def _default_options(root: dict[str, Any]) -> dict[str, str]:
    """The option that config.yaml selects of each group; profiles of clusters are no options of a run."""
    entries = [item for item in root["defaults"] if isinstance(item, dict)]
    return {
        key: str(option)
        for item in entries
        for key, option in item.items()
        if " " not in key and "@" not in key and key != "cluster"
    }


def _options(group: str, folder: Path) -> list[Path]:
    return sorted((folder / group).glob("*.yaml"))


def _group_lines(folder: Path, defaults: dict[str, str]) -> Iterator[str]:
    for group, default in defaults.items():
        for file in _options(group, folder):
            name = f"**{file.stem}**" if file.stem == default else file.stem
            yield f"| {group} | {name} | {_escaped(first_comment(file))} |\n"


def _shared_objective_lines(folder: Path) -> Iterator[str]:
    file = folder / "every_objective.yaml"
    meanings = comments(file)
    for key, value in option_tree(file).items():
        yield f"| `objective.{key}` | {_code(value)} | {_escaped(meanings.get(key, ''))} |\n"


def _parameter_lines(folder: Path) -> Iterator[str]:
    for file in _options("objective", folder):
        config_type = REGISTRY[file.stem].config_type
        meanings = {config_key(name): text for name, text in field_docstrings(config_type).items()}
        for key, value in option_tree(file).items():
            if key != "name":
                meaning = _escaped(meanings.get(key, ""))
                yield f"| {file.stem} | `objective.{key}` | {_code(value)} | {meaning} |\n"


def _values(name: str, folder: Path, root: dict[str, Any], defaults: dict[str, str]) -> dict[str, str]:
    """Each key's value in the default option, and what other options have in its place."""
    files = {file.stem: option_tree(file) for file in _options(name, folder)} or {"": root[name]}
    if name == "data":
        shared = option_tree(folder / "data_filter.yaml")
        files = {option: tree | {"filter": shared} for option, tree in files.items()}
    every = f"every_{name}" if name in ("model", "data") else None
    base = dict(leaves(option_tree(folder / f"{every}.yaml"), f"{name}.")) if every else {}
    found: dict[str, dict[str, list[str]]] = {}
    for option, tree in files.items():
        for key, value in (base | dict(leaves(tree, f"{name}."))).items():
            found.setdefault(key, {}).setdefault(_code(value), []).append(option)
    return {key: _told_apart(options, defaults.get(name, ""), len(files)) for key, options in found.items()}


def _told_apart(options: dict[str, list[str]], default: str, num_options: int) -> str:
    """Values, the default option's first, the others with the options that have them."""
    if sum(len(names) for names in options.values()) == num_options and len(options) == 1:
        return next(iter(options))
    ordered = sorted(options.items(), key=lambda item: default not in item[1])
    return "; ".join(
        value if default in names else f"{value} ({', '.join(names)})" for value, names in ordered
    )


def _fields(prefix: str, schema: dict[str, Any], known: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, its schema) of every key below a section."""
    section = known[_plain(schema)["$ref"].rsplit("/", 1)[-1]]
    for name, field in section["properties"].items():
        if "$ref" in _plain(field):
            yield from _fields(f"{prefix}.{name}", field, known)
        else:
            yield f"{prefix}.{name}", field


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    """pydantic wraps a reference that has a description."""
    inner: dict[str, Any] = field["allOf"][0] if "allOf" in field else field
    return inner


def _key_line(key: str, value: str, field: dict[str, Any], folder: Path) -> str:
    """A line of a table; where the schema has no meaning, the YAML file's comment has."""
    meaning = field.get("description") or _comment(key, folder)
    return f"| `{key}` | {value} | {_kind(field)} | {_escaped(' '.join(meaning.split()))} |\n"


def _comment(key: str, folder: Path) -> str:
    section, _, rest = key.partition(".")
    for file in _options(section, folder):
        if rest in (known := comments(file)):
            return known[rest]
    return comments(folder / "config.yaml").get(key, "")


def _kind(field: dict[str, Any]) -> str:
    """What values a key takes, in words: type, range, alternatives."""
    if "anyOf" in field:
        return ", or ".join(_kind(option) for option in field["anyOf"])
    if "const" in field or "enum" in field:
        values = field.get("enum", [field.get("const")])
        return _escaped(" | ".join(f"`{value}`" for value in values))
    kind = field.get("type", "any")
    if kind == "array":
        return f"list of {_kind(field.get('items', {}))}"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "mapping"}
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = " and ".join(f"{sign} {_number(field[name])}" for name, sign in signs.items() if name in field)
    return f"{words.get(str(kind), str(kind))} {bounds}".strip()


def _number(value: float) -> str:
    """Large limits as powers: 2^63, 10^9."""
    for base in (10, 2):
        exponent = len(str(int(value))) - 1 if base == 10 else int(value).bit_length() - 1
        if exponent > 5 and value == base**exponent:
            return f"{base}^{exponent}"
    return f"{value:g}"


def _code(value: Any) -> str:
    """A value as code."""
    return f"`{_escaped(shown(value))}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
