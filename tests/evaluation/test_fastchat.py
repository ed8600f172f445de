"""MT-Bench's files, read and judged by FastChat's own code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rcpo.evaluation.forms import Answered, Turn, written
from rcpo.evaluation.prompts import Prompt

QUESTIONS = [
    {"question_id": number, "category": "writing", "turns": [f"first {number}", f"second {number}"]}
    for number in (82, 81)
]
JUDGING = '''
"""The steps of fastchat.llm_judge.gen_judgment's main; a rule stands for the judge's server: the length of
the answer that it is shown, or whose answer is longer."""
import json, re, sys
from fastchat.llm_judge import common, gen_judgment

def reply(model, conversation, temperature, max_tokens):
    shown = [len(text) for text in re.findall("<<(x*)>>", conversation.messages[0][1])]
    if len(shown) == 1:
        return f"[[{shown[0]}]]"
    return "[[A]]" if shown[0] > shown[1] else "[[B]]" if shown[0] < shown[1] else "[[C]]"

common.chat_completion_openai = reply
name = "gpt-4"
assert name in common.OPENAI_MODEL_LIST
questions = common.load_questions("question.jsonl", None, None)
answers = common.load_model_answers("model_answer")
models = common.get_model_list("model_answer")
single, double = (
    common.Judge(name, {"name": kind, "type": kind, "system_prompt": "judge", "prompt_template": asked,
                        "output_format": form}, multi_turn=True)
    for kind, asked, form in (
        ("single", "{question_1} {question_2} {answer_1} <<{answer_2}>>", "[[rating]]"),
        ("pairwise", "{question_1} {question_2} {answer_a_1} {answer_b_1} <<{answer_a_2}>> <<{answer_b_2}>>",
         "[[A]]"),
    )
)
common.check_data(questions, answers, {}, models, {"single": single, "pairwise": double})
scored = [common.play_a_match_single(match, "") for match in gen_judgment.make_match_single(
    questions, models, answers, single, multi_turn=True)]
judged = [common.play_a_match_pair(match, "") for match in gen_judgment.make_match(
    questions, models, answers, double, "off", multi_turn=True)]
scores = [[each["question_id"], each["model"], each["score"]] for each in scored]
winners = [[each["question_id"], each["g1_winner"], each["g2_winner"]] for each in judged]
json.dump({"models": sorted(models), "scores": scores, "winners": winners}, open("found.json", "w"))
'''


@pytest.mark.ci("FastChat", needs="fastchat")
def test_fastchat_judges_answers_of_rcpo_generate(tmp_path: Path) -> None:
    """Its own code finds the files by their names, joins them with its questions, and shows its judge both
    turns of the answers: the scores are the lengths of the second turns, by hand, and of two files the
    longer wins in both orders."""
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    (tmp_path / "model_answer").mkdir()
    for name, lengths in (("mine", (7, 2)), ("off", (5, 4))):
        answered = [
            Answered(Prompt(question["turns"][0], (question["turns"][1],), question), "",
                     [[Turn("first", 1, True), Turn("x" * length, length, True)]])
            for question, length in zip(QUESTIONS, lengths, strict=True)
        ]  # fmt: skip
        (tmp_path / "model_answer" / f"{name}.jsonl").write_text(written("mt_bench", answered, name))
    ran = subprocess.run(
        [sys.executable, "-c", JUDGING],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["models"] == ["mine", "off"]
    assert sorted(found["scores"]) == [[81, "mine", 2], [81, "off", 4], [82, "mine", 7], [82, "off", 5]]
    assert sorted(found["winners"]) == [[81, "model_2", "model_2"], [82, "model_1", "model_1"]]
