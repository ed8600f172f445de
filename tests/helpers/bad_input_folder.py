"""A folder full of faults for `test_bad_input.py`: data files, model folders, config files and runs, each
with one thing wrong with it, made from the model that ships with rcpo."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from rcpo.models.load import model_place

TINY = Path(model_place("builtin:tiny"))
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PAIRS = [
    {
        "prompt": f"{('alice', 'bob', 'carol', 'david')[i % 4]} has {NUMBERS[i % 10]} apples and gets "
        f"{NUMBERS[i // 10]} more . how many ?",
        "chosen": " seven",
        "rejected": " eight",
    }
    for i in range(40)
]
"""Plain text in the words of the embedded model."""


def json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def changed(**entries: Any) -> str:
    """The pairs with other entries, as JSON lines."""
    return json_lines([{**pair, **entries} for pair in PAIRS])


DATA: dict[str, str | bytes] = {
    "good.jsonl": json_lines(PAIRS),
    "chat.jsonl": json_lines(
        [{**pair, "prompt": [{"role": "user", "content": pair["prompt"]}]} for pair in PAIRS]
    ),
    "nulls.jsonl": changed(chosen=None),
    "some-nulls.jsonl": json_lines([*PAIRS, {**PAIRS[0], "rejected": None}]),
    "one.jsonl": json_lines(PAIRS[:1]),
    "none.json": "[]",
    "none.csv": "prompt,chosen,rejected\n",
    "empty.jsonl": "",
    "identical.jsonl": changed(rejected=" seven"),
    "blank.jsonl": changed(chosen="  "),
    "numbers.jsonl": changed(chosen=7),
    "nan.jsonl": '{"prompt": NaN, "chosen": " a", "rejected": " b"}\n' * 4,
    "mixed.jsonl": changed(rejected=[{"role": "assistant", "content": "eight"}]),
    "robot.jsonl": changed(prompt=[{"role": "robot", "content": "x"}]),
    "list-role.jsonl": changed(prompt=[{"role": ["user"], "content": "x"}]),
    "user-last.jsonl": changed(chosen=[{"role": "user", "content": "x"}], rejected=[]),
    "surrogate.jsonl": changed(chosen=" seven\ud800"),
    "unknown-words.jsonl": changed(chosen=" Paris", rejected=" London"),
    "columns.jsonl": json_lines([{"question": "a", "good": "b", "bad": "c"}]),
    "named.jsonl": json_lines([{"question": "a", "response_j": "b", "response_k": "c"}]),
    "answers.jsonl": json_lines([{"prompt": "how many ?", "response": "seven"}]),
    "kto.jsonl": json_lines([{"prompt": f"a{n}", "completion": "b", "label": n % 2 == 0} for n in range(40)]),
    "ratings.jsonl": json_lines([{"prompt": "a", "completion": "b", "label": "good"}] * 4),
    "good_alone.jsonl": json_lines([{"prompt": f"a{n}", "completion": "b", "label": 1} for n in range(40)]),
    "lists.jsonl": json_lines(
        [
            {"prompt": f"a{n}", "responses": [" one", " two", " three"], "scores": [n, 0, 1.5]}
            for n in range(40)
        ]
    ),
    "unordered.jsonl": json_lines([{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}] * 4),
    "bad_alone.jsonl": json_lines([{"prompt": f"a{n}", "completion": "b", "label": 0} for n in range(40)]),
    "scored.jsonl": json_lines([{"instruction": "a", "completions": [{"response": "b"}]}]),
    "judged.jsonl": json_lines([{"conversations": [{"from": "human", "value": "a"}], "label": True}]),
    "talks.jsonl": json_lines(
        [
            {
                "messages": [
                    {"role": role, "content": f"{role} {n} {place}"}
                    for place in range(2)
                    for role in ("user", "assistant")
                ]
            }
            for n in range(40)
        ]
    ),
    "mute.jsonl": json_lines([{"messages": [{"role": "user", "content": "a"}]}] * 4),
    "implicit.jsonl": json_lines([{"chosen": "It is seven", "rejected": "It is eight"}]),
    "from-robot.jsonl": changed(prompt=[{"from": "robot", "value": "x"}]),
    "broken.jsonl": '{"prompt": "a"}\n{"prompt": a}\n',
    "broken.json": '[{"prompt": 1},',
    "list.json": "[1, 2]",
    "deep.json": "[" * 100_000,
    "deep.jsonl": '{"prompt": ' + "[" * 100_000 + "\n",
    "digits.json": '[{"prompt": ' + "9" * 6000 + "}]",
    "broken.csv": 'prompt,chosen,rejected\n"a,b,c\n',
    "wide.csv": "prompt,chosen,rejected\na,b,c,d\n",
    "broken.parquet": b"PAR1",
    "half.jsonl.gz": b"\x1f\x8b\x08\x00",
    "text.jsonl.gz": b"x",
    "latin.jsonl": b'{"prompt": "\xe9"}\n',
    "utf16.jsonl": '{"prompt": "a"}\n'.encode("utf-16"),
    "pairs.txt": "x",
    "negative.jsonl": changed(weight=-1),
    "weightless.jsonl": changed(weight=0),
    "text-weight.jsonl": changed(weight="much"),
    "certain.jsonl": changed(probability=0),
    "taken/notes.txt": "mine",
    "a-file": "x",
    "no-turn.jinja": "hello",
    "broken.jinja": "{% if %}",
    "latin.jinja": b"\xff",
    "cuts.jinja": "{% for m in messages %}{{ m.role + m.content.split()[-1] }}{% endfor %}",
    "conf/objective/broken.yaml": "name: [\n",
    "conf2/objective/latin.yaml": b"name: \xff\n",
    "conf3/objective/list.yaml": "- a\n",
    "conf3/experiment/lost.yaml": "train: {steps: 3}\n",
    "half-run/config.yaml": "a: [\n",
    "list-run/config.yaml": "- a\n",
    "half-sweep/manifest.jsonl": "{\n",
}


def make_folder(folder: Path) -> None:
    """Write everything; takes about two seconds."""
    for name, content in DATA.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "empty-folder").mkdir()
    (folder / "loop.jsonl").symlink_to("loop.jsonl")
    (folder / "link").symlink_to("taken")
    os.mkfifo(folder / "pipe.jsonl")
    for name, spoil in MODELS.items():
        shutil.copytree(TINY, folder / name)
        spoil(folder / name)
    make_other_kinds(folder)
    make_runs(folder)


def edited(**entries: Any) -> Callable[[Path], None]:
    """Write other entries into a model's config.json."""

    def edit(model: Path) -> None:
        config = json.loads((TINY / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | entries))

    return edit


def written(name: str, text: str) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / name).write_text(text)

    return write


def without(pattern: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        for file in model.glob(pattern):
            file.unlink()

    return remove


def truncate(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def pickle_weights(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


class Evil:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


def pickle_evil(model: Path) -> None:
    torch.save({"model.norm.weight": Evil()}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def lose_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    first = names[: len(names) // 2]
    save_file({name: tensors[name] for name in first}, model / "model-00001-of-00002.safetensors")
    files = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (model / "model.safetensors").unlink()


def break_index(model: Path) -> None:
    lose_shard(model)
    (model / "model.safetensors.index.json").write_text("{")


def tokenizer_without(*keys: str) -> Callable[[Path], None]:
    """Take entries such as pad_token out of tokenizer_config.json and config.json."""

    def edit(model: Path) -> None:
        for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
            entries = json.loads((model / name).read_text())
            for key in keys:
                entries.pop(key, None)
                entries.pop(f"{key}_id", None)
            (model / name).write_text(json.dumps(entries))
        for file in model.glob("chat_template*") if "chat_template" in keys else ():
            file.unlink()

    return edit


MODELS: dict[str, Callable[[Path], None]] = {
    "no-config": without("config.json"),
    "no-weights": without("*.safetensors"),
    "no-tokenizer": without("token*"),
    "text-config": written("config.json", "{"),
    "list-config": written("config.json", "[]"),
    "martian": edited(model_type="martian"),
    "other-kind": edited(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]),
    "other-width": edited(hidden_size=192),
    "more-layers": edited(num_hidden_layers=4),
    "small-vocabulary": edited(vocab_size=10),
    "short-positions": edited(max_position_embeddings=8),
    "text-tokenizer": written("tokenizer.json", "{"),
    "truncated": truncate,
    "garbage": written("model.safetensors", "garbage" * 100),
    "pickled": pickle_weights,
    "evil": pickle_evil,
    "lost-shard": lose_shard,
    "broken-index": break_index,
    "no-template": tokenizer_without("chat_template"),
    "two-models": written("adapter_config.json", '{"r": 8}'),
    "own-code": edited(model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"}),
    "no-pad": tokenizer_without("pad_token"),
    "no-eos": tokenizer_without("eos_token"),
}
"""Each is the embedded model, spoilt; the last three train."""


def make_other_kinds(folder: Path) -> None:
    """An encoder-decoder and an encoder, an adapter, and two folders that are no adapters."""
    transformers_logging.disable_progress_bar()
    t5 = T5Config(vocab_size=200, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    bert = BertConfig(
        vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for name, model in (("t5", T5ForConditionalGeneration(t5)), ("bert", BertForMaskedLM(bert))):
        model.save_pretrained(folder / name)
        for file in TINY.glob("tok*"):
            shutil.copy(file, folder / name)
    adapters = {
        "adapter": '{"base_model_name_or_path": "org/base", "r": 8}',
        "text-adapter": "{",
        "dora-adapter": '{"peft_type": "LORA", "use_dora": true}',
    }
    for name, text in adapters.items():
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(text)
        (folder / name / "adapter_model.safetensors").write_bytes(b"")


def make_runs(folder: Path) -> None:
    """Run folders without checkpoints, as `rcpo train` freezes them."""
    from rcpo.config.compose import compose
    from rcpo.config.resolve import resolve
    from rcpo.config.validate import validate
    from rcpo.runs.folder import RunFolder
    from rcpo.runs.frozen import config_tree

    for name in ("run", "typo-run", "text-run", "moved-run"):
        tree = compose(["train.device=cpu", "tracking=none", f"run_dir={folder / name}"])
        assert tree is not None
        config = resolve(validate(tree), None)
        RunFolder(folder / name).create(config, config_tree(config))
    typo = yaml.safe_load((folder / "typo-run/config.yaml").read_text())
    (folder / "typo-run/config.yaml").write_text(yaml.safe_dump(typo | {"typo": 1}))
    (folder / "text-run/run.json").write_text("{")
