"""A task file of lm-eval's form, with its data."""

import json
from pathlib import Path
from typing import Any

import yaml

from rcpo.records.arithmetic import problem_split


def write_task(folder: Path) -> list[dict[str, Any]]:
    """A task file with its data beside it: word problems, each with the right answer and two near misses."""
    folder.mkdir()
    rows = [
        {"question": f"<s><|user|>{problem.prompt()}<|assistant|>",
         "choices": [problem.response(number) for number in (problem.answer, *problem.near_misses()[:2])],
         "answer": 0}
        for problem in problem_split(0, 12, 3)[1]
    ]  # fmt: skip
    (folder / "sums.json").write_text(json.dumps(rows))
    entries = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "sums.json")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "sums.yaml").write_text(yaml.safe_dump(entries))
    return rows
