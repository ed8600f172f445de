"""The model that ships with rcpo: its files, its tokenizer, what it answers, and the script that made it."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rcpo.builtin
from helpers import forked
from rcpo.builtin.make_tiny import (
    IGNORED_LABEL,
    build_model,
    build_tokenizer,
    draw_answer,
    draw_sequences,
    sft_problems,
    train_sft,
)
from rcpo.records.arithmetic import NUMBERS, Problem, all_problems, arithmetic_records

TINY = Path(rcpo.builtin.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY)


def test_files_are_small_and_hold_no_pickle():
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 3e6


def test_shipped_tokenizer_is_what_the_script_builds(tokenizer):
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert tokenizer.special_tokens_map == built.special_tokens_map


def test_conversation_to_ids(tokenizer):
    """<s> <|user|> ... ? <|assistant|> alice has seven apples now . </s>: EOS once, at the end."""
    train, _ = arithmetic_records(1, 1, 0)
    prompt = tokenizer.apply_chat_template(train[0].prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(train[0].prompt + train[0].chosen, tokenize=False)
    question, answer = train[0].prompt[0]["content"], train[0].chosen[0]["content"]
    assert prompt == f"<s><|user|>{question}<|assistant|>"
    assert whole == prompt + answer + "</s>"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole_ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert whole_ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.convert_ids_to_tokens(whole_ids[len(prompt_ids) :]) == [*answer.split(), "</s>"]
    assert tokenizer.decode(whole_ids, skip_special_tokens=True) == f"{question} {answer}"


def test_every_problem_is_known_words_only(tokenizer):
    texts = [
        text for problem in all_problems() for text in (problem.prompt(), problem.response(problem.answer))
    ]
    ids = tokenizer(texts)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert tokenizer("alice has a zebra")["input_ids"].count(tokenizer.unk_token_id) == 2


def test_model_answers_with_a_well_formed_sentence_near_the_truth(tokenizer, model):
    """Greedy answers to 32 held-out problems: the right sentence around a number at most 2 off."""
    assert 300_000 <= model.num_parameters() <= 1_000_000
    assert next(model.parameters()).dtype == torch.float32
    held_out = arithmetic_records(1, 32, 0)[1]
    for record in held_out:
        inputs = tokenizer.apply_chat_template(
            record.prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert output[-1] == tokenizer.eos_token_id
        words = tokenizer.decode(output, skip_special_tokens=True).split()
        right = record.chosen[0]["content"].split()
        assert words[:2] + words[3:] == right[:2] + right[3:]
        assert abs(NUMBERS.index(words[2]) - NUMBERS.index(right[2])) <= 2


def test_sft_never_sees_a_held_out_problem():
    """9,450 problems less the 256 held out by default."""
    seen = {problem.prompt() for problem in sft_problems()}
    assert len(seen) == 9194
    assert seen.isdisjoint(record.prompt[0]["content"] for record in arithmetic_records(2048, 256, 0)[1])


def test_half_of_the_sft_answers_are_right():
    """10,000 draws: 5,000 right with standard deviation 50, each of 4 misses 1,250 with 33; five of them."""
    problem, rng = Problem("alice", "apples", "gets", 3, 4), random.Random(0)
    answers = [draw_answer(problem, rng) for _ in range(10_000)]
    assert abs(answers.count(7) - 5000) < 250
    assert all(abs(answers.count(miss) - 1250) < 165 for miss in (5, 6, 8, 9))
    assert set(answers) == {5, 6, 7, 8, 9}


def test_sft_labels_cover_the_response_and_eos(tokenizer):
    """6 words and EOS carry a label in every row, also in padded ones; nothing else does."""
    ids, labels = draw_sequences(tokenizer, sft_problems(), 16, random.Random(0))
    assert (ids == tokenizer.pad_token_id).any()
    for row, label in zip(ids, labels, strict=True):
        labelled = label[label != IGNORED_LABEL]
        assert torch.equal(labelled, row[label != IGNORED_LABEL])
        words = tokenizer.convert_ids_to_tokens(labelled.tolist())
        assert (len(words), words[1], words[-3:]) == (7, "has", ["now", ".", "</s>"])


def test_the_recipe_is_deterministic(tokenizer):
    """The same seed gives the same bits after two SFT steps; another seed does not."""

    def weights(seed):
        model = build_model(tokenizer, seed)
        train_sft(model, tokenizer, steps=2, seed=seed)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_command_line_makes_a_loadable_folder(tmp_path, model):
    """Three steps of the real script: the files and tensor shapes of the shipped folder."""
    out = tmp_path / "tiny"
    code = "import sys; from rcpo.builtin.make_tiny import main; main(sys.argv[1:])"
    done = forked.script(code, out, "--steps", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 3 of 3: loss" in done.stdout
    assert {path.name for path in out.iterdir()} == {path.name for path in TINY.iterdir()}
    made = AutoModelForCausalLM.from_pretrained(out)
    assert {name: value.shape for name, value in made.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
