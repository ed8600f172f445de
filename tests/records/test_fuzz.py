"""Input that nobody would think of: whatever is read is either taken or refused in one line, and what is
written and read back is what it was. The examples are the same in every run."""

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.tiny_tokenizers import GENERATION, TURNS, make_bpe, make_words
from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.resolve import resolve
from rcpo.config.resolved import resolved_of
from rcpo.config.schema import DataConfig
from rcpo.config.validate import validate
from rcpo.data.tokenize import tokenize_records
from rcpo.records.load import load_records
from rcpo.records.places import Place
from rcpo.records.readers import read_rows
from rcpo.records.record import BadRowError, PreferenceRecord, read_record
from rcpo.runs.frozen import config_tree
from rcpo.runs.rows import decode_row, encode_row
from rcpo.sweep.definition import read_definition
from rcpo.sweep.expand import expand


def tries(num: int) -> settings:
    return settings(
        max_examples=num,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def refused(call: Callable[[], Any]) -> Any:
    """What `call` returns, or None where it was refused, in one printable line that says something."""
    try:
        return call()
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    assert len(said) > 10
    return None


ANY_TEXT = st.text(st.characters(codec=None), max_size=12) | st.text(
    st.sampled_from("ab \n\x00\ud800"), max_size=6
)
"""Half characters too, as JSON can spell them."""
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "robot"]) | JSON
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": ANY_TEXT | JSON})
PART = ANY_TEXT | st.lists(MESSAGE, max_size=3) | JSON
ROW = st.fixed_dictionaries({"chosen": PART, "rejected": PART}, optional={"prompt": PART, "other": JSON})
ROWS = st.lists(ROW | st.dictionaries(ANY_TEXT, JSON, max_size=3), max_size=5)


PARTS = st.tuples(st.none() | PART, PART, PART) | st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT)
"""Of any kind, or of one kind, which more often make a record."""


@tries(200)
@given(parts=PARTS)
def test_any_row_becomes_a_record_that_can_train_or_a_reason(parts: tuple[Any, Any, Any]) -> None:
    prompt, chosen, rejected = parts
    try:
        record = read_record(prompt, chosen, rejected, 0)
    except BadRowError:
        return
    assert record.chosen != record.rejected
    made = (record.prompt, record.chosen, record.rejected)
    assert len({type(part) for part in made}) == 1
    json.dumps(made, ensure_ascii=False).encode()


@tries(100)
@given(
    rows=ROWS,
    ending=st.sampled_from([".json", ".jsonl", ".jsonl.gz"]),
    policy=st.sampled_from(["error", "drop"]),
)
def test_any_rows_of_json_are_read_or_refused_in_one_line(
    tmp_path: Path, rows: list[Any], ending: str, policy: Any
) -> None:
    """What is read back from a file of any kind is what was written."""
    path = tmp_path / f"rows{ending}"
    text = json.dumps(rows) if ending == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    read = refused(lambda: read_rows(Place(str(path), None), {"prompt", "chosen", "rejected"}))
    if read is not None:
        assert json.dumps(read.rows) == json.dumps(rows)
    config = DataConfig(source="file", path=str(path), eval_pairs=1, on_bad_row=policy)
    data = refused(lambda: load_records(config))
    if data is not None:
        assert len(data.held_out) == 1
        assert data.train


@tries(100)
@given(
    content=st.binary(max_size=60), ending=st.sampled_from([".json", ".jsonl", ".csv", ".parquet", ".csv.gz"])
)
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes, ending: str) -> None:
    path = tmp_path / f"bytes{ending}"
    path.write_bytes(content)
    refused(lambda: load_records(DataConfig(source="file", path=str(path), eval_pairs=1)))


TOKENIZERS = [make_bpe(), make_bpe(None, None), make_words()]
for _tokenizer in TOKENIZERS:
    _tokenizer.chat_template = TURNS + GENERATION
WHOLE_TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@tries(150)
@given(
    texts=st.tuples(WHOLE_TEXT, WHOLE_TEXT, WHOLE_TEXT), is_chat=st.booleans(), which=st.integers(0, 2),
    max_length=st.integers(2, 30), max_prompt_length=st.none() | st.integers(1, 20),
)  # fmt: skip
def test_any_text_is_split_into_a_prompt_and_two_responses_within_the_limits(
    texts: tuple[str, str, str], is_chat: bool, which: int, max_length: int, max_prompt_length: int | None
) -> None:
    """Both sides begin with one prompt; no response is empty; and the whole, uncut, decodes to the texts."""
    prompt, chosen, rejected = texts
    try:
        record = read_record(
            [{"role": "user", "content": prompt}] if is_chat else prompt, chosen, rejected, 0
        )
    except BadRowError:
        return
    limit = max_prompt_length if max_prompt_length is None else min(max_prompt_length, max_length - 1)
    for pair in tokenize_records([record], TOKENIZERS[which], max_length, limit, "drop").pairs:
        sides = (pair.chosen, pair.rejected)
        assert len({tuple(side.input_ids[: side.num_prompt]) for side in sides}) == 1
        for side in sides:
            assert 1 <= side.num_prompt <= (limit or max_length)
            assert side.num_prompt < len(side.input_ids) <= max_length
    if which == 1 and not is_chat:  # bytes, without markers: nothing is lost
        assert_round_trip(record)


def assert_round_trip(record: PreferenceRecord) -> None:
    tokenizer = TOKENIZERS[1]
    for pair in tokenize_records([record], tokenizer, 10_000, None, "drop").pairs:
        for side, text in ((pair.chosen, record.chosen), (pair.rejected, record.rejected)):
            assert tokenizer.decode(side.input_ids) == f"{record.prompt}{text}"


KEYS = [
    "objective", "objective.beta", "calibration", "calibration.scope", "model.path", "model.lora.rank",
    "data", "data.path", "data.columns", "data.seed", "optim.lr", "optim.betas", "deepspeed.stage",
    "deepspeed.extra", "deepspeed.extra.a", "tracking.tags", "train", "train.steps", "train.epochs",
    "train.max_length", "name",
    "run_dir", "seed", "hydra.run.dir", "+typo", "++train.typo", "~train.steps", "launch.processes", "",
]  # fmt: skip
VALUES = [
    "", "null", "true", "off", "1", "-1", "1e400", "nan", ".inf", "'x'", '"', "[1,2]", "[", "{a: 1}",
    "${seed}", "${oc.env:HOME}", "???", "dpo", "simpo", "full", "a,b", "../x", "1:2", "0x10",
    "!!python/object:os.system",
]  # fmt: skip
WORD = st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES) | WHOLE_TEXT) | WHOLE_TEXT


@tries(40)
@given(words=st.lists(WORD, min_size=1, max_size=3))
def test_any_words_make_a_config_or_one_line(tmp_path: Path, words: list[str]) -> None:
    """A config that was made is the same when frozen and read back."""

    def make() -> Any:
        if any(word in ("-h", "--help") for word in words):
            return None
        tree = compose([*words, "train.device=cpu"])
        return None if tree is None else resolve(validate(tree), None)

    config = refused(make)
    if config is not None:
        frozen = yaml.safe_dump(config_tree(config), sort_keys=False)
        assert resolved_of(yaml.safe_load(frozen)) == config


TREE = {
    "objective": {"name": "dpo"}, "calibration": {"name": "on"}, "model": {"path": "builtin:tiny"},
    "data": {"source": "arithmetic"}, "optim": {"name": "adamw"}, "deepspeed": {},
    "tracking": {"name": "none"},     "train": {"device": "cpu"}, "metrics": {}, "launch": {},
}  # fmt: skip


@tries(300)
@given(
    section=st.sampled_from(sorted(TREE)), key=st.sampled_from(
        ["name", "path", "source", "steps", "lr", "betas", "beta", "tags", "extra", "lora", "columns"]
    ) | ANY_TEXT, value=JSON, whole=st.booleans(),
)  # fmt: skip
def test_any_tree_is_a_config_or_one_line(section: str, key: str, value: Any, whole: bool) -> None:
    entry = value if whole else {**TREE[section], key: value}
    refused(lambda: resolve(validate({**TREE, section: entry}), None))


@tries(200)
@given(
    row=st.dictionaries(ANY_TEXT.filter(lambda key: key != "step"), st.floats(), max_size=5),
    step=st.integers(0),
)
def test_a_row_of_metrics_is_read_back_as_it_was(row: dict[str, float], step: int) -> None:
    """To the bit: nan and the infinities too, in JSON that any reader takes."""
    line = encode_row({"step": step, **row})
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = decode_row(line)
    assert again.pop("step") == step
    assert list(again) == list(row)
    for key, value in row.items():
        assert again[key] == value or (math.isnan(again[key]) and math.isnan(value))


AXIS = (
    st.sampled_from(["objective", "calibration", "optim.lr", "seed", "train.steps", "a b", "name"]) | ANY_TEXT
)
LEVEL = st.sampled_from(["dpo", "simpo", "on", "off", "1e-4", 1, "a/b", "..", ""]) | SCALAR
SWEEP = st.fixed_dictionaries(
    {"axes": st.dictionaries(AXIS, st.lists(LEVEL, max_size=3) | JSON, max_size=3)},
    optional={
        "name": ANY_TEXT, "seeds": st.lists(st.integers(0, 3), max_size=3) | JSON,
        "order": st.lists(AXIS, max_size=2),
        "overrides": st.lists(WORD, max_size=2) | JSON, "cell_name": ANY_TEXT, "estimate": JSON,
        "exclude": st.lists(st.dictionaries(AXIS, LEVEL, max_size=2), max_size=2) | JSON,
        "include": st.lists(st.dictionaries(AXIS | st.just("label"), LEVEL, max_size=2), max_size=2) | JSON,
    },
)  # fmt: skip


@tries(150)
@given(tree=SWEEP | JSON)
def test_any_sweep_file_is_cells_or_one_line(tmp_path: Path, tree: Any) -> None:
    """Cells have names that are safe as file names and unlike each other on any file system."""
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # YAML reads JSON
    points = refused(lambda: expand(read_definition(str(path))))
    if points is not None:
        names = [point.name for point in points]
        assert len({name.lower() for name in names}) == len(names)
        assert all(name and len(name) <= 100 and name.isascii() and "/" not in name for name in names)
        assert not {".", ".."} & set(names)
