"""Tiny tokenizers and chat templates for all tests: made here, no network, no files; and short ways to use
them."""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rcpo.data.template import PLAIN_TEMPLATE
from rcpo.data.tokenize import TokenizedData, TokenizedPair, TokenizedSide, tokenize_records
from rcpo.records.record import PreferenceRecord, read_record

SPECIAL = ["<s>", "</s>", "<|turn|>", "<|end|>"]
TEXTS = [
    "user assistant system User: Assistant: You are helpful. Is the sky blue? Yes, the sky is blue. No!",
    "What is two plus two? It is four. It is five.\n\nq1 q2 a b c d e f g h i j yes no 1 2 3 4 5 6 7 8 9",
]
TURNS = "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "chatml": TURNS + GENERATION,
    "chatml with BOS": "{{ bos_token }}" + TURNS + GENERATION,
    "chatml with BOS twice": "{{ bos_token }}{{ bos_token }}" + TURNS + GENERATION,
    "default system prompt": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|turn|>system\nYou are helpful.<|end|>\n' }}{% endif %}"
        + TURNS
        + GENERATION
    ),
    "EOS after the answer": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "nothing after the answer": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    ),
    "content trimmed": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
    "generation prompt that the conversation lacks": TURNS
    + "{% if add_generation_prompt %}{{ '<|turn|>assistant\n<|turn|>\n' }}{% endif %}",
    "plain": PLAIN_TEMPLATE,
}
CLOSED_BY_TEMPLATE = {name for name in TEMPLATES if "chatml" in name} | {
    "default system prompt",
    "content trimmed",
    "generation prompt that the conversation lacks",
}
"""Those whose turns end with <|end|>; the others end with EOS, by themselves or by rcpo."""


def make_bpe(
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    special: tuple[str, ...] = (),
    writes_bos: bool = True,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of a few hundred tokens, all bytes among them, and `special` ones behind SPECIAL. It
    writes its BOS in front of a text that it is called on, as Llama's does, or not, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[*SPECIAL, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    if writes_bos:
        _write_in_front(tokenizer, bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def make_words(bos: str | None = "<s>", eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """One token a word; white space is no part of any token. Ids: <s> 0, </s> 1, <|turn|> 2, <|end|> 3, a
    10, b 11, ... z 35. It writes its BOS in front of a text that it is called on."""
    vocabulary = {token: idx for idx, token in enumerate(SPECIAL)} | {"[?]": 4}
    vocabulary |= {chr(ord("a") + number): 10 + number for number in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[?]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    _write_in_front(tokenizer, bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def _write_in_front(tokenizer: Tokenizer, bos: str | None) -> None:
    if bos is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )


def tokenize(
    records: list[PreferenceRecord],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 512,
    max_prompt_length: int | None = None,
    on_bad_row: str = "error",
) -> TokenizedData:
    return tokenize_records(records, tokenizer, max_length, max_prompt_length, on_bad_row)


def tokenize_one(
    prompt: Any, chosen: Any, rejected: Any, tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> TokenizedPair:
    return tokenize([read_record(prompt, chosen, rejected, 0)], tokenizer, **limits).pairs[0]


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [
        {"role": ("user", "assistant")[number % 2], "content": content}
        for number, content in enumerate(contents)
    ]


def prompt_of(side: TokenizedSide) -> list[int]:
    return side.input_ids[: side.num_prompt]


def response_of(side: TokenizedSide) -> list[int]:
    return side.input_ids[side.num_prompt :]


def sides_of(pair: TokenizedPair) -> tuple[TokenizedSide, TokenizedSide]:
    return pair.chosen, pair.rejected
