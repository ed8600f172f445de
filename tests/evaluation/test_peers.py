"""Files for other tools, read by their own code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.loopback_judge import longer
from rcpo.commands.judge import summarise
from rcpo.evaluation.answer_files import join_answers
from rcpo.evaluation.forms import Answered, Turn, written
from rcpo.evaluation.prompts import Prompt

pytestmark = pytest.mark.ci("alpaca_eval", needs="alpaca_eval")


def write(path: Path, generator: str, lengths: list[int]) -> str:
    """Answers of so many letters, as `rcpo generate format=alpaca_eval` writes them."""
    answered = [
        Answered(Prompt(f"question {idx}", row={"instruction": f"question {idx}", "dataset": "mine"}), "",
                 [[Turn("x" * length, length, True)]])
        for idx, length in enumerate(lengths)
    ]  # fmt: skip
    path.write_text(written("alpaca_eval", answered, generator))
    return str(path)


def test_alpaca_eval_judges_answers_of_rcpo_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own evaluation reads both files and joins them; a function that prefers the longer answer stands
    for the judge's server. Of five prompts A is longer to three, and one is a tie: 3.5 of 5, as `rcpo judge`
    has it."""
    import alpaca_eval
    from alpaca_eval.annotators import base

    def judge(prompts: list[str], **settings: Any) -> dict[str, Any]:
        shown = [re.findall(r"<<(x*)>>", prompt) for prompt in prompts]
        said = [longer(one, two) for one, two in shown]
        return {"completions": said, "price_per_example": [0.0] * len(said),
                "time_per_example": [0.0] * len(said)}  # fmt: skip

    monkeypatch.setattr(base, "get_fn_completions", lambda name: judge)
    a = write(tmp_path / "a.json", "mine", [9, 8, 7, 5, 1])
    b = write(tmp_path / "b.json", "off", [4, 4, 4, 5, 6])
    (tmp_path / "asked.txt").write_text("{instruction} <<{output_1}>> <<{output_2}>>")
    own = {
        "prompt_template": str(tmp_path / "asked.txt"), "fn_completions": "judge", "completions_kwargs": {},
        "fn_completion_parser": "regex_parser", "batch_size": 1,
        "completion_parser_kwargs": {
            "outputs_to_match": {1: r"\[\[1\]\]", 2: r"\[\[2\]\]", 1.5: r"\[\[tie\]\]"}
        },
    }  # fmt: skip
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"judge": own}))
    board, annotations = alpaca_eval.evaluate(
        model_outputs=a, reference_outputs=b, annotators_config=str(tmp_path / "judge.yaml"),
        fn_metric="get_winrate", sort_by="win_rate", precomputed_leaderboard=None, output_path=None,
        is_cache_leaderboard=False, is_return_instead_of_print=True, caching_path=None,
    )  # fmt: skip
    assert list(board.index) == ["mine"]
    assert [row["dataset"] for row in annotations] == ["mine"] * 5
    joined = join_answers(Path(a), Path(b))
    verdicts = [
        (longer(duel.a, duel.b).strip("[]"), longer(duel.b, duel.a).strip("[]")) for duel in joined.duels
    ]
    ours = summarise([a, b], "longer", joined, verdicts)["win_rate"]["value"]
    assert board["win_rate"]["mine"] == 100 * ours == pytest.approx(70.0)
    assert json.loads(Path(a).read_text())[0]["generator"] == "mine"
