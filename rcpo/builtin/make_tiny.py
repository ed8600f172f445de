"""Make `model=tiny`: a word-level tokenizer, and a Llama after SFT on right and wrong answers.

    python -m rcpo.builtin.make_tiny OUT

writes a Hugging Face model folder to OUT: 341,472 parameters, fp32, 1.4 MB; 110 s on one CPU thread. The same
machine and libraries give the same bytes. Owns tokenizer, architecture and SFT recipe; the problems belong to
`rcpo.records.arithmetic`. Called by hand; training reads the files in `rcpo/builtin/tiny`.

An SFT answer is right with probability 1/2, else one of the near misses, drawn anew for every sequence;
held-out problems of data.seed=0 are left out. So the model can add but is unsure whether it should. With four
near misses, an answer's entropy is log(2)/2 + log(8)/2 = 1.39 nats, 0.20 a token: there the loss ends.

Two choices decide how preference training moves it (AdamW 3e-4, 150 steps, held-out change of z_w).
The initialisation is twice as wide as Llama's (0.04), so that AdamW's steps are smaller beside the weights:
in trials calibration ended between -0.1 and +0.2 nats at 0.02, between +0.3 and +0.6 at 0.04; at 0.08 SimPO
without calibration raised the chosen response in two runs of three.
The near misses are drawn: with one fixed for each problem, both responses fell with calibration too.
"""

import argparse
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rcpo.records.arithmetic import WORDS, Problem, all_problems, assistant_turn, problem_split, user_turn

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
ASSISTANT = "<|assistant|>"
SPECIAL_TOKENS = (PAD, UNK, BOS, EOS, "<|system|>", "<|user|>", ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""No spaces around the markers, so that a prompt as it is generated from begins the whole conversation."""

MAX_LENGTH = 1024
HELD_OUT_PAIRS, DATA_SEED = 256, 0
"""The held-out problems of conf/data/arithmetic.yaml, which SFT must not see."""
IGNORED_LABEL = -100
"""Label of tokens that the SFT loss leaves out."""
SEQUENCES_PER_STEP = 64
LR = 2e-3
WARMUP_STEPS = 20


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word of `rcpo.records.arithmetic`, after the special tokens; lower case, split at spaces."""
    vocabulary = {word: idx for idx, word in enumerate([*SPECIAL_TOKENS, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained Llama: hidden 96, 3 layers, 4 heads, untied head, fp32; initialised from `seed`."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            initializer_range=0.04,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        max_new_tokens=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def sft_problems() -> list[Problem]:
    """Every problem but the held-out ones of data=arithmetic with its default seed."""
    _, held_out = problem_split(0, HELD_OUT_PAIRS, DATA_SEED)
    return [problem for problem in all_problems() if problem not in set(held_out)]


def draw_answer(problem: Problem, rng: random.Random) -> int:
    """The right answer with probability 1/2, else one of the near misses, all equally likely."""
    return problem.answer if rng.random() < 0.5 else rng.choice(problem.near_misses())


def draw_sequences(
    tokenizer: PreTrainedTokenizerFast, problems: list[Problem], num: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Token ids and labels (num, T) int64 of conversations about random problems.

    Labels are the ids of the response and its EOS, and `IGNORED_LABEL` elsewhere.
    """
    conversations = []
    for problem in (rng.choice(problems) for _ in range(num)):
        response = problem.response(draw_answer(problem, rng))
        conversations.append(user_turn(problem.prompt()) + assistant_turn(response))
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    ids = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")["input_ids"]
    marker = ids == tokenizer.convert_tokens_to_ids(ASSISTANT)
    in_response = (marker.cumsum(1) > 0) & ~marker & (ids != tokenizer.pad_token_id)
    return ids, ids.masked_fill(~in_response, IGNORED_LABEL)


def train_sft(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Train `model` in place for `steps` optimizer steps: AdamW, short warm-up, then linear decay to 0."""
    rng = random.Random(seed)
    problems = sft_problems()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        ids, labels = draw_sequences(tokenizer, problems, SEQUENCES_PER_STEP, rng)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f} nats per response token", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Make the model and write it to the folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m rcpo.builtin.make_tiny", description="Make the model of model=tiny."
    )
    parser.add_argument("out", type=Path, help="folder to write; made where it is missing")
    parser.add_argument(
        "--steps", type=int, default=1000, help="SFT steps of 64 sequences (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="fixes weights and answers (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # sums in one order, so that the result can be reproduced
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(sft_problems()):,} problems")
    train_sft(model, tokenizer, options.steps, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out, save_jinja_files=False)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
