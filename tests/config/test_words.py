"""Words that are refused before Hydra reads them, and names of other tools: what to type in place of each."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rcpo.commands.parser import command_parser
from rcpo.common.conf import conf_dir, option_tree
from rcpo.common.errors import UserError
from rcpo.config.meanings import leaves
from rcpo.config.other_names import ADVICE, KEY_OF, typed_for_flag, typed_here
from rcpo.config.refused import refuse_words, takes_null
from rcpo.config.schema import Config

REFUSED = {
    "~tracking": "~tracking: nothing can be removed; type tracking=none",
    "~train.steps": "~train.steps: nothing can be removed; type train.steps=null",
    "~seed": "~seed: nothing can be removed; leave it out for its default, or type seed=VALUE",
    "~optim": "~optim: nothing can be removed; choose another option with optim=OPTION: adamw, adamw_8bit, "
    "rmsprop, sgd",
    "my.yaml": "my.yaml: settings in a file are an experiment; write them as DIR/experiment/my.yaml with the "
    "line '# @package _global_' first, and type --config-dir DIR experiment=my",
    "a/experiment/my.yaml": "a/experiment/my.yaml: is no KEY=VALUE; type --config-dir {folder}/a "
    "experiment=my",
    "grid.yaml": "grid.yaml: is a sweep, not an experiment; type rcpo sweep grid.yaml",
    "pairs.jsonl": "pairs.jsonl: is no KEY=VALUE; type data=file data.path=pairs.jsonl for your pairs",
    "--package objective": "--package: says how --cfg prints; type --cfg job as well, or leave --package out",
    "--resolve": "--resolve: says how --cfg prints; type --cfg job as well, or leave --resolve out",
    "--hydra-help": "--hydra-help: no such flag; `rcpo train --help` lists them",
}
"""Words, and the whole message."""
REFUSED_FLAGS = {
    "--config my.yaml": "--config my.yaml: settings in a file are an experiment; ",
    "--config-name base": "--config-name base: settings in a file are an experiment; ",
    "--learning_rate 1e-5": "--learning_rate: no such flag; type optim.lr=VALUE",
    "--output-dir=out": "--output-dir=out: no such flag; type run_dir=out",
    "--hydra-help": "unrecognized arguments: --hydra-help; `rcpo train --help` lists words and flags",
}
"""What the parser says of them, or how it begins."""


@pytest.mark.parametrize("words", REFUSED)
def test_words_that_are_refused(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.yaml").write_text("name: a\naxes: {seed: [0, 1]}\n")
    with pytest.raises(UserError) as caught:
        refuse_words(words.split())
    assert str(caught.value) == REFUSED[words].format(folder=tmp_path)


def test_words_that_are_let_through(tmp_path: Path) -> None:
    refuse_words(["--cfg", "job", "--package", "objective", "--resolve", "seed=1"])
    refuse_words(["--config-dir", f"{tmp_path}/a.yaml", "data.path=a.jsonl", "+deepspeed.extra.a=1"])


@pytest.mark.parametrize("line", REFUSED_FLAGS)
def test_flags_that_are_refused(line: str) -> None:
    with pytest.raises(UserError) as caught:
        command_parser("train").parse(line.split())
    assert str(caught.value).startswith(REFUSED_FLAGS[line])


def test_names_of_other_tools() -> None:
    """By the name, by the last part of a dotted one, in any case; a value of another tool's as rcpo's."""
    assert typed_here("optimizer", "paged_adamw_8bit") == "optim=adamw_8bit"
    assert typed_here("optimizer", "adamw_torch") == "optim=adamw"
    assert typed_here("trainer.max_steps", "30") == "train.steps=30"
    assert typed_here("LR", "1e-5") == "optim.lr=1e-5"
    assert typed_here("loss_type", "exo_pair") == "objective=exo"
    assert typed_here("report_to", "none") == "tracking=none"
    assert typed_here("optim.lr", "1") is None
    assert typed_here("nonsense", "1") is None
    assert typed_for_flag("--gradient-accumulation-steps=4") == typed_here("grad_accum", "4")


def every_key() -> set[str]:
    """Dotted names that some option has, and the groups."""
    found = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    found |= {name for name, _ in leaves(option_tree(conf_dir() / "config.yaml"), "")}
    for path in conf_dir().glob("*/*.yaml"):
        found |= {name for name, _ in leaves(option_tree(path), f"{path.parent.name}.")}
    for group in ("model", "objective"):
        tree: dict[str, Any] = yaml.safe_load((conf_dir() / f"every_{group}.yaml").read_text())
        found |= {name for name, _ in leaves(tree, f"{group}.")}
    return found


def test_the_table_names_keys_that_there_are() -> None:
    keys = every_key()
    assert set(KEY_OF.values()) <= keys
    for name, text in ADVICE.items():
        first = text.split()[0]
        assert first.split("=")[0] in keys or first in ("rcpo", "--overwrite", "--config-dir"), name
    assert not set(KEY_OF) & set(ADVICE)
    own = {key for key in keys if "." not in key}
    assert not own & (set(KEY_OF) | set(ADVICE)), "a word of rcpo's own is no other tool's"


def test_which_keys_take_null() -> None:
    fields = Config.__pydantic_fields__  # type: ignore[attr-defined]
    assert {name for name in fields if takes_null(name)} == {"name", "run_dir"}
    assert takes_null("model.lora.rank")
    assert not takes_null("model.lora.dropout")
    assert not takes_null("no.such")
