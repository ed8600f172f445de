"""Configuration: every shipped file composes and validates, every mistake is one exact line, nulls are filled
in.

Composing goes through Hydra in another process, as users start it: Hydra keeps state per process.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import forked
from helpers.selection import asked_for, matrix
from rcpo.common.conf import conf_dir
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.names import data_label, default_name, model_label
from rcpo.config.resolve import default_micro_batch, resolve
from rcpo.config.schema import Config
from rcpo.config.validate import validate
from rcpo.objectives import REGISTRY
from rcpo.runs.frozen import config_tree, open_run

COMPOSE = """
import json, sys
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.common.errors import UserError
for words in json.load(sys.stdin):
    try:
        tree = compose(words)
        validate(tree)
        print(json.dumps({"tree": tree}))
    except UserError as error:
        print(json.dumps({"error": str(error)}))
"""
"""One process for many command lines; each answers with a line of JSON."""

NEEDED = {"data/file": ["data.path=p"], "data/mmpr": ["data.path=p"],
          "model/hf": ["model.path=p"], "model/tiny_vision": ["data=shapes"],
          "data/shapes": ["model=tiny_vision"], "optim/sgd": ["optim.lr=0.1"],
          "calibration/fixed": ["calibration.alpha=1.2"]}  # fmt: skip
"""What an option leaves unset on purpose."""
SHIPPED = sorted(
    str(path.relative_to(conf_dir()).with_suffix(""))
    for path in conf_dir().glob("*/*.yaml")
    if path.parent.name != "cluster"  # profiles of SLURM: `tests/sweep/test_slurm_script.py`
)
OPTIONS = {name: [name.replace("/", "="), *NEEDED.get(name, [])] for name in SHIPPED}

VALID = {
    "calibration=true": {"calibration": {"name": "on"}},
    "calibration=TRUE": {"calibration": {"name": "on"}},
    "calibration=on": {"calibration": {"name": "on"}},
    "calibration=false": {"calibration": {"name": "off"}},
    "calibration=off": {"calibration": {"name": "off"}},
    "calibration='off'": {"calibration": {"name": "off"}},
    "name=123": {"name": 123},
    "optim.lr=1e-5": {"optim": {"lr": 1e-5}},
    "train.epochs=2": {"train": {"epochs": 2}},
    "model.chat_template_kwargs={enable_thinking: false}": {
        "model": {"chat_template_kwargs": {"enable_thinking": False}}
    },
    "model.chat_template_kwargs.enable_thinking=false": {
        "model": {"chat_template_kwargs": {"enable_thinking": False}}
    },
    "deepspeed.extra={a: {b: 1}}": {"deepspeed": {"extra": {"a": {"b": 1}}}},
    "data.columns={prompt: q}": {"data": {"columns": {"prompt": "q"}}},
}
"""A word, and the part of the tree that it makes."""

WRONG = {
    "model=tiny_vision": "model=tiny_vision: knows the words of data=shapes alone; type data=shapes as well",
    "data=shapes": "data=shapes: has pictures, and model=tiny sees none; type model=tiny_vision as well",
    "calibration=maybe": "calibration=maybe: no such option; choose one of "
    + ", ".join(sorted(path.stem for path in (conf_dir() / "calibration").glob("*.yaml"))),
    "train.stepz=3": "train.stepz: no such key; did you mean train.steps? `rcpo train --help` lists them",
    "cluster=cpu": "cluster: is a SLURM profile, for sweeps; type rcpo sweep FILE --slurm PROFILE",
    "cluster=cpuu": "cluster=cpuu: no such option; did you mean cluster=cpu? The options are cpu, example",
    "experiment=base": "experiment=base: no such file; write DIR/experiment/base.yaml and type --config-dir "
    "DIR experiment=base (there is example)",
    "+experiment=example": "+experiment=example: is a group that is there already; type experiment=example "
    "without the +",
    "beta=0.2": "beta: no such key; type objective.beta=0.2",
    "learning_rate=1e-5": "learning_rate: no such key; type optim.lr=1e-5",
    "gamma=1": "gamma: objective=dpo has no such key, only objective.beta; objective=alpha_po, pl_simpo, "
    "simpo have objective.gamma",
    "momentum=.9": "momentum: optim=adamw has no such key; optim=rmsprop, sgd have optim.momentum",
    "pairs_per_step=4": "pairs_per_step: no such key; did you mean train.pairs_per_step? "
    "`rcpo train --help` lists them",
    "loss_type=sigmoid": "loss_type: no such key; type objective=dpo",
    "model=org/name": "model=org/name: is no option; a model's folder or hub id is a key: "
    "type model.path=org/name",
    "seed=range(0,3)": "seed=range(0,3): is several values, and this is one run; for a run of each type "
    "rcpo train -m 'seed=range(0,3)'",
    "nogroup=3": "nogroup: no such key; `rcpo train --help` lists them",
    "objective.betta=1": "objective.betta: objective=dpo has no such key; did you mean objective.beta? "
    "`rcpo train --help` lists them",
    "objective.agregate=kl_dro": "objective.agregate: objective=dpo has no such key; did you mean "
    "objective.aggregate? `rcpo train --help` lists them",
    "objective.aggregate=max": "objective.aggregate=max: must be mean, kl_dro or dr_dpo; "
    "type objective.aggregate=mean",
    "calibration.ema_beta=0.5": "calibration.ema_beta: calibration=off has no such key; calibration=exact, "
    "on, published have calibration.ema_beta",
    "objective=simp": "objective=simp: no such option; did you mean objective=simpo? The options are "
    + ", ".join(sorted(REGISTRY)),
    "objective=dpo,simpo": "objective=dpo,simpo: is several values, and this is one run; for a run of each "
    "type rcpo train -m objective=dpo,simpo",
    "+typo=1": "typo: no such key; `rcpo train --help` lists them (remove +typo=...)",
    "+train.typo=1": "train.typo: no such key; `rcpo train --help` lists them (remove +train.typo=...)",
    "+objective.betta=1": "objective.betta=1: dpo has no such parameter; did you mean objective.beta?",
    "+calibration=on": "+calibration=on: is a group that is there already; type calibration=on without the +",
    "objective=null": "null: is no option of a group; `rcpo train --help` lists groups and options",
    "train.steps=abc": "train.steps=abc: must be a valid integer; type train.steps=VALUE",
    "train.steps=1.5": "train.steps=1.5: must be a valid integer; type train.steps=VALUE",
    "train.steps=true": "train.steps=true: must be a valid integer; type train.steps=VALUE",
    "train.steps=0": "train.steps=0: must be greater than 0; type train.steps=VALUE",
    "train=5": "train=5: is a group of keys; type train.KEY=VALUE",
    "deepspeed.stage=7": "deepspeed.stage=7: must be less than or equal to 3; type deepspeed.stage=VALUE",
    "model.dtype=fp16": "model.dtype=fp16: must be 'auto', 'float32' or 'bfloat16'; type model.dtype=VALUE",
    "objective.beta=abc": "objective.beta=abc: must be a finite number; type objective.beta=0.1",
    "objective.beta=-1": "objective.beta=-1: must be greater than 0; type objective.beta=0.1",
    "data=file": "data.path: has no value and data=file needs one; type data.path=PAIRS.jsonl",
    "optim=sgd": "optim.lr: has no value and needs one; type optim.lr=...",
    "data.seed=${nope}": "data.seed: interpolation key 'nope' not found; type data.seed=VALUE",
    "foo": "foo: cannot be read as KEY=VALUE; quote values that hold signs as KEY='\"VALUE\"'",
    "train.steps=[1": "train.steps=[1: cannot be read as KEY=VALUE; "
    "quote values that hold signs as KEY='\"VALUE\"'",
    "--nope": "--nope: no such flag; `rcpo train --help` lists them",
    "-m": "-m: is for several values of a key, as in objective=dpo,simpo; leave it out",
    "deepspeed.extra=5": "deepspeed.extra=5: must be an object; type deepspeed.extra=VALUE",
}
"""A word, and the whole message."""


@pytest.fixture(scope="module")
def composed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Answers to this file's command lines that are asked for, by name; made elsewhere than in the source
    tree."""
    asked = {params.get("name") for params in asked_for(request)}
    options = {name: words for name, words in OPTIONS.items() if name in asked}
    lines = options | {word: [word] for word in [*VALID, *WRONG]}
    folder = tmp_path_factory.mktemp("elsewhere")
    halves = [dict(list(lines.items())[number::2]) for number in range(2)]
    children = [
        forked.start_script(COMPOSE, cwd=folder, input=json.dumps(list(half.values()))) for half in halves
    ]
    answers = {}
    for half, child in zip(halves, children, strict=True):
        done = child.completed(120)
        assert (done.returncode, done.stderr) == (0, "")
        answers |= dict(zip(half, map(json.loads, done.stdout.splitlines()), strict=True))
    assert list(folder.iterdir()) == [], "composing must write nothing"
    return answers


@pytest.mark.parametrize("name", matrix(SHIPPED, SHIPPED[1::3].__contains__, "every shipped option"))
def test_every_shipped_option_composes_and_validates(composed: dict[str, dict[str, Any]], name: str) -> None:
    """Invariant 12, first half. An objective's or calibration's file carries its own name, as the registry
    has it."""
    assert "error" not in composed[name]
    group, option = name.split("/")
    if group in ("objective", "calibration"):
        assert composed[name]["tree"][group]["name"] == option


def test_every_objective_has_a_file() -> None:
    assert {name for name in SHIPPED if name.startswith("objective/")} == {
        f"objective/{name}" for name in REGISTRY
    }


@pytest.mark.parametrize("word", VALID)
def test_spellings_that_are_right(composed: dict[str, dict[str, Any]], word: str) -> None:
    tree = composed[word]["tree"]
    for group, expected in VALID[word].items():
        shown = {key: tree[group][key] for key in expected} if isinstance(expected, dict) else tree[group]
        assert shown == expected


@pytest.mark.parametrize("word", WRONG)
def test_mistakes_are_one_exact_line(composed: dict[str, dict[str, Any]], word: str) -> None:
    assert composed[word] == {"error": WRONG[word]}


def test_unset_values_and_group_mistakes_leave_the_flags_working(tmp_path: Path) -> None:
    """--cfg job prints the composed YAML and stops, with a value unset too."""
    code = "from rcpo.config.compose import *; print(compose(sys.argv[1:]))"
    done = forked.script(code, "optim=sgd", "--cfg", "job", cwd=tmp_path)
    *document, answer = done.stdout.splitlines()
    assert answer == "None"
    assert yaml.safe_load("\n".join(document))["optim"]["lr"] == "???"


def test_an_unknown_key_is_one_line_where_flags_print_too() -> None:
    with pytest.raises(UserError, match=r"^train\.stepz: no such key; did you mean train\.steps"):
        compose(["--cfg", "job", "train.stepz=3"])


def plain_tree(**groups: dict[str, Any]) -> dict[str, Any]:
    """The smallest valid tree, with entries of `groups` over it."""
    tree: dict[str, Any] = {
        "objective": {"name": "dpo"}, "calibration": {"name": "on"}, "model": {"path": "builtin:tiny"},
        "data": {"source": "arithmetic"}, "optim": {"name": "adamw"}, "deepspeed": {},
        "tracking": {"name": "none"},
        "train": {"device": "cpu"}, "metrics": {}, "launch": {},
    }  # fmt: skip
    return {group: {**values, **groups.get(group, {})} for group, values in tree.items()}


def resolved(joined: int | None = None, **groups: dict[str, Any]) -> Config:
    return resolve(validate(plain_tree(**groups)), joined)


def message(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value)


def test_missing_group_is_named() -> None:
    tree = plain_tree()
    del tree["optim"]
    assert message(lambda: validate(tree)) == "optim: has no value and needs one; type optim=..."


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            {"train": {"steps": 3, "epochs": 1}},
            "train.steps=3 and train.epochs=1.0: give one of the two; "
            "type train.steps=null or train.epochs=null",
        ),
        (
            {"train": {"max_length": 64, "max_prompt_length": 64}},
            "train.max_prompt_length=64: must be less than train.max_length=64, so that a response has room; "
            "type train.max_prompt_length=32",
        ),
        (
            {"data": {"source": "file"}},
            "data.path: has no value and data=file needs one; type data.path=PAIRS.jsonl",
        ),
        (
            {"deepspeed": {"stage": 0, "offload": "optimizer"}},
            "deepspeed.offload=optimizer: needs ZeRO 1, 2 or 3; type deepspeed.stage=2",
        ),
        ({"optim": {"name": "sgd"}}, "optim.lr: has no value and optim=sgd needs one; type optim.lr=0.01"),
        (
            {"calibration": {"ema_beta": 1}},
            "calibration.ema_beta=1: must be less than 1; type calibration.ema_beta=VALUE",
        ),
    ],
)
def test_combinations_that_cannot_be(groups: dict[str, dict[str, Any]], expected: str) -> None:
    assert message(lambda: validate(plain_tree(**groups))) == expected


def test_nulls_are_filled_in_for_the_embedded_default() -> None:
    """CPU, fp32, 150 steps, lr 3e-4, the largest divisor of 16 up to 16, ZeRO 1, an absolute run folder."""
    config = resolved()
    assert (config.model.dtype, config.train.steps, config.train.epochs) == ("float32", 150, None)
    assert (config.optim.lr, config.train.pairs_per_device, config.deepspeed.stage) == (3e-4, 16, 1)
    assert config.name is not None
    assert config.run_dir == str(Path(f"runs/{config.name}").absolute())
    assert config.tracking.tags == ["dpo", "calibration-on", "tiny", "arithmetic"]


def test_nulls_are_filled_in_for_a_users_model_and_data() -> None:
    """One epoch, lr 1e-6, the largest divisor of 18 up to 4: 3. What the user gave stays."""
    groups = {"data": {"source": "file", "path": "d/pairs.jsonl.gz"}, "model": {"path": "org/model"}}
    config = resolved(**groups, train={"pairs_per_step": 18}, tracking={"tags": ["dpo", "mine"]})
    assert (config.train.steps, config.train.epochs) == (None, 1.0)
    assert (config.optim.lr, config.train.pairs_per_device) == (1e-6, 3)
    assert config.tracking.tags == ["dpo", "calibration-on", "model", "pairs", "mine"]
    given = resolved(train={"steps": 7, "pairs_per_device": 2}, optim={"lr": 0.5}, deepspeed={"stage": 0})
    assert (given.train.steps, given.train.pairs_per_device) == (7, 2)
    assert (given.optim.lr, given.deepspeed.stage) == (0.5, 0)


def test_resolving_twice_changes_nothing() -> None:
    once = resolved()
    assert resolve(once, None) == once


@pytest.mark.parametrize(
    ("joined", "groups", "expected"),
    [
        (
            None,
            {"train": {"pairs_per_step": 10}, "launch": {"processes": 4}},
            "train.pairs_per_step=10: must be a multiple of the 4 ranks; type train.pairs_per_step=12",
        ),
        (
            3,
            {},
            "train.pairs_per_step=16: must be a multiple of the 3 ranks; type train.pairs_per_step=18",
        ),
        (
            None,
            {"train": {"pairs_per_step": 16, "pairs_per_device": 6}, "launch": {"processes": 2}},
            "train.pairs_per_device=6: must divide the 8 pairs that each of 2 ranks has of "
            "train.pairs_per_step=16; type train.pairs_per_device=4",
        ),
        (
            None,
            {"launch": {"gpus_per_node": 2}},
            "launch.gpus_per_node=2: no CUDA device is used here; type launch.processes=2 for CPU ranks",
        ),
        (
            None,
            {"launch": {"nodes": 2}},
            "launch.nodes=2: ranks on several nodes are started by torchrun or srun, one task per GPU; "
            "type launch.nodes=1 here",
        ),
        (
            3,
            {"launch": {"nodes": 2}},
            "launch.nodes=2: must divide the 3 ranks that were started; type launch.nodes=1",
        ),
    ],
)
def test_sizes_that_do_not_divide(
    joined: int | None, groups: dict[str, dict[str, Any]], expected: str
) -> None:
    assert message(lambda: resolved(joined, **groups)) == expected


def test_the_suggested_sizes_are_accepted() -> None:
    """What the messages above tell to type works."""
    launch = {"processes": 4}
    assert resolved(train={"pairs_per_step": 12}, launch=launch).train.pairs_per_device == 3
    assert resolved(train={"pairs_per_device": 4}, launch={"processes": 2}).train.pairs_per_device == 4


def test_ranks_that_were_started_decide() -> None:
    """4 ranks on 2 nodes: 2 a node, a world of 4, and 16/4 pairs each."""
    config = resolved(4, launch={"nodes": 2})
    assert (config.launch.processes, config.world_size(), config.train.pairs_per_device) == (2, 4, 4)


@pytest.mark.parametrize("name", ["a/b", "-x", ".hidden", "a b", "x" * 101, "é"])
def test_names_that_are_no_file_names(name: str) -> None:
    assert message(lambda: resolve(validate(plain_tree() | {"name": name}), None)) == (
        f"name={name!r}: must be 1 to 100 letters, digits, '.', '_' or '-', and start with a letter or "
        "digit; type for example name=dpo-on-1"
    )


def test_labels_and_default_name() -> None:
    """Last part of a path; a name that is safe as a folder's, whatever the path."""
    config = validate(
        plain_tree(model={"path": "/x/My Model/"}, data={"source": "file", "path": "a/hh.jsonl.gz"})
    )
    assert (model_label(config), data_label(config)) == ("My Model", "hh")
    labels = {"/x/pairs/*.jsonl": "pairs", "part-*.jsonl": "part-", "*.csv": "files", "a/b/": "b"}
    for path, label in labels.items():
        data = dataclasses.replace(config.data, path=path)
        assert data_label(dataclasses.replace(config, data=data)) == label
    data = dataclasses.replace(config.data, path=["x/a.jsonl", "b.jsonl", "c.jsonl"])
    assert data_label(dataclasses.replace(config, data=data)) == "a-and-2-more"
    objective, calibration, label, day, time = default_name(config).split("-")
    assert (objective, calibration, label, len(day), len(time)) == ("dpo", "on", "My_Model", 8, 6)


def test_frozen_file_reads_back_equal(tmp_path: Path) -> None:
    """Resolved -> YAML -> validated is the same config, with numbers that YAML spells oddly and names like
    numbers."""
    tree = plain_tree(optim={"lr": 1e-7, "eps": 1e-20}) | {"name": "123", "run_dir": str(tmp_path)}
    config = resolve(validate(tree), None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_tree(config), sort_keys=False))
    run, again = open_run(str(tmp_path))
    assert again == config
    assert run.path == tmp_path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            None,
            "{run}: is not a run folder (it has no config.yaml); give the folder that `rcpo train` printed",
        ),
        ("[1]", "{run}/config.yaml: is not a config"),
        ("a: [", "{run}/config.yaml: is not YAML ("),
    ],
)
def test_folders_that_are_no_runs(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    said = message(lambda: open_run(str(tmp_path)))
    assert said.startswith(expected.format(run=tmp_path))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("device", "tiny", "max_length", "limit"),
    [("cpu", False, 128, 4), ("cpu", True, 128, 16), ("cuda", True, 4096, 16), ("cuda", False, 128, 16),
     ("cuda", False, 512, 16), ("cuda", False, 1024, 8), ("cuda", False, 2048, 4), ("cuda", False, 8192, 4)],
)  # fmt: skip
def test_micro_batches_by_themselves(device: str, tiny: bool, max_length: int, limit: int) -> None:
    """On a GPU as many pairs as 8,192 tokens a side hold, from 4 to 16; of 7 and of 24 pairs a divisor."""
    assert default_micro_batch(64, device, tiny, max_length) == limit
    assert default_micro_batch(7, device, tiny, max_length) == (7 if limit > 7 else 1)
    assert default_micro_batch(24, device, tiny, max_length) == {4: 4, 8: 8, 16: 12}[limit]
