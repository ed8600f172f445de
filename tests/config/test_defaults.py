"""A default stands once, in conf/. The schema reads it there for a config that lacks the key, and has values
of its own for four keys alone."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rcpo.common import conf
from rcpo.common.conf import conf_dir, option_tree, value_in_conf
from rcpo.common.errors import UserError
from rcpo.config.meanings import leaves
from rcpo.config.schema import Config
from rcpo.config.validate import validate

OWN = {
    "calibration.every": (1, "8 for those that measure scores; metrics.geometry_every counts for the others"),
    "calibration.warmup_steps": (0, "the same, 50"),
    "calibration.alpha": (1.0, "fixed has none that could be meant; the others have no use for it"),
    "data.on_bad_row": ("error", "real files nearly always hold a few; a bad problem is rcpo's fault"),
}
"""Keys whose default is written in the schema, and why it is another than conf/'s."""
BASES = {
    "": "config.yaml",
    "data.filter.": "data_filter.yaml",
    "data.": "every_data.yaml",
    "model.": "every_model.yaml",
}
"""Files beside the groups, and where their keys belong."""
SMALLEST: dict[str, Any] = {
    "objective": {"name": "dpo"}, "calibration": {"name": "off"}, "model": {"path": "builtin:tiny"},
    "data": {"source": "arithmetic", "train_pairs": 8}, "optim": {"name": "adamw"}, "deepspeed": {},
    "tracking": {"name": "wandb"}, "train": {}, "metrics": {}, "launch": {},
}  # fmt: skip
"""Every key that has a default is lacking."""


def keys_in_conf() -> set[str]:
    folder = conf_dir()
    places = [(f"{path.parent.name}.", path) for path in sorted(folder.glob("*/*.yaml"))]
    places += [(prefix, folder / name) for prefix, name in BASES.items()]
    return {key for prefix, path in places for key, _ in leaves(option_tree(path), prefix)}


def defaults_of(config_type: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(key, what stands behind it in the schema) of every key with a default."""
    for field in fields(config_type):
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from defaults_of(field.type, f"{prefix}{field.name}.")
        elif (field.default, field.default_factory) != (MISSING, MISSING):
            yield f"{prefix}{field.name}", field


def test_the_schema_has_no_default_but_those_that_differ() -> None:
    found = {}
    for key, field in defaults_of(Config, ""):
        factory = field.default_factory
        if getattr(factory, "func", None) is not value_in_conf:
            found[key] = field.default
    assert found == {key: value for key, (value, _) in OWN.items()}


def test_every_default_is_found_and_is_of_its_kind() -> None:
    """Also where an option has no use for it: a config of nothing but names is whole, and valid again."""
    config = validate(SMALLEST)
    tree = json.loads(json.dumps(config, default=vars))
    assert validate(tree) == config
    named = dict(leaves(tree, ""))
    assert named["optim.betas"] == [0.9, 0.999]
    assert named["optim.momentum"] == 0.0  # of sgd
    assert named["model.lora.targets"] == "all-linear"
    assert named["calibration.feedback.pairs"] == 64


def test_a_default_that_is_changed_in_conf_is_changed_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it stands nowhere else. A list is the config's own: who changes it changes no default."""
    shutil.copytree(conf_dir(), tmp_path / "conf")
    adamw = tmp_path / "conf/optim/adamw.yaml"
    adamw.write_text(adamw.read_text().replace("[0.9, 0.999]", "[0.5, 0.6]"))
    root = tmp_path / "conf/config.yaml"
    root.write_text(root.read_text().replace("max_length: 1024", "max_length: 77"))
    monkeypatch.setattr(conf, "conf_dir", lambda: tmp_path / "conf")
    config = validate(SMALLEST)
    assert (config.optim.betas, config.train.max_length) == ([0.5, 0.6], 77)
    config.optim.betas.append(0.1)
    assert validate(SMALLEST).optim.betas == [0.5, 0.6]
    adamw.write_text("name: adamw\n")
    conf.option_tree.cache_clear()
    with pytest.raises(UserError) as caught:
        validate(SMALLEST)
    assert str(caught.value) == (
        "betas: has no default in conf/optim/adamw.yaml and conf/optim/sgd.yaml and "
        "conf/optim/adamw_8bit.yaml and conf/optim/rmsprop.yaml; put it back there"
    )
    conf.option_tree.cache_clear()


def test_an_option_says_only_how_it_differs_from_the_one_it_begins_from() -> None:
    """What Hydra makes of `defaults`, without Hydra; `tests/config/test_config.py` composes each of them."""
    folder = conf_dir()
    begun = [
        path for path in folder.glob("*/*.yaml") if "defaults" in (yaml.safe_load(path.read_text()) or {})
    ]
    begun = [path for path in begun if path.parent.name != "experiment"]
    assert {path.stem for path in begun} >= {"hh_rlhf", "ultrafeedback", "none"}
    for path in begun:
        own = yaml.safe_load(path.read_text())
        (first, last) = own.pop("defaults")
        assert last == "_self_"
        before = option_tree(path.with_name(f"{first}.yaml"))
        assert option_tree(path) == before | own
        assert {key: value for key, value in own.items() if before.get(key) == value} == {}


def test_every_key_of_the_schema_can_be_set_in_some_option() -> None:
    """Else it would be refused on the command line as a key that is not there."""
    assert {key for key, _ in defaults_of(Config, "")} <= keys_in_conf()
