"""An option of the group `evaluation` by its name, or a YAML file like one, for `rcpo evaluate`.

Trainings get theirs from Hydra (train.evaluate). Loads nothing heavy."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from rcpo.common.conf import conf_dir, option_tree
from rcpo.common.errors import UserError
from rcpo.config.evaluation import DEFAULT, EvaluationConfig
from rcpo.config.validate import section_of


def option_named(word: str) -> EvaluationConfig:
    """Its keys over those that every option has. Raises UserError where there is no such option or file, and
    for a file that is none."""
    shipped = {file.stem: file for file in sorted((conf_dir() / "evaluation").glob("*.yaml"))}
    if word in shipped:
        return section_of(EvaluationConfig, option_tree(shipped[word]))
    file = Path(word)
    if not file.is_file() or file.suffix != ".yaml":
        raise UserError(
            f"evaluation={word}: no such option; choose one of {', '.join(shipped)}, or give a .yaml file "
            "like one of them"
        )
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        own = None
    if not isinstance(own, dict):
        raise UserError(f"evaluation={word}: is not YAML with keys and values; mend the file")
    before: dict[str, Any] = option_tree(shipped[DEFAULT])
    named = own.pop("defaults", [])
    for name in named if isinstance(named, list) else [named]:
        if name not in (*shipped, "_self_"):
            raise UserError(
                f"evaluation={word}: defaults: {name}: no such option; choose of {', '.join(shipped)}"
            )
        if name != "_self_":
            before = before | option_tree(shipped[name])
    try:
        return section_of(EvaluationConfig, before | own)
    except UserError as error:
        raise UserError(f"evaluation={word}: {error}") from None


def with_settings(option: EvaluationConfig, settings: dict[str, Any]) -> EvaluationConfig:
    """The option with the settings that were given, those that are not None, in place of its own."""
    given = {key: value for key, value in settings.items() if value is not None}
    return dataclasses.replace(option, **given)
