"""HTML reports of run folders made by hand, with pairs that have a text."""

import json
from pathlib import Path

from helpers.compare_folders import compare
from rcpo.comparison.table import make_lines
from rcpo.report.page import make_page

REJECTED = (-2.0, -2.0, -2.0, -2.0)
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"fail()\"> & \"q\" 'a'"


def page_of(path: Path) -> str:
    comparison = compare(path)
    return make_page(make_lines(comparison), comparison, "no")


def write_pairs(path: Path, words: str = "right") -> dict[str, object]:
    """Four pairs to hold out and one to train on; the settings of a run that does so."""
    rows = [
        {"prompt": f"question {idx}", "chosen": f"{words} {idx}", "rejected": f"wrong {idx}"}
        for idx in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = path.with_name("train.jsonl")
    train.write_text(json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    return {"data.source": "file", "data.path": str(train), "data.eval_path": str(path), "data.eval_pairs": 4}
