"""Chat formats of today's models: the frame that each puts around a turn, as templates of our own, with a
tiny tokenizer that has the format's special tokens.

Only the frame is here (no tools, no dates, no checks): what stands in front of a response, what behind it,
and which tokens end generation. The facts are from the models' cards and configs; DeepSeek's wide bars are
plain ones here."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from helpers.tiny_tokenizers import make_bpe
from rcpo.data.generation import Generation, set_generation


@dataclass(frozen=True)
class Format:
    """How q1 is asked and "yes" answered, and what of it must be scored."""

    template: str
    prompt: str
    """As inference sees it, but for what the template's own answered conversations lack."""
    response: str
    """As the model has to write it, its end included."""
    eos: str
    """The tokenizer's."""
    ends: tuple[str, ...] = ()
    """eos_token_id of generation_config.json."""
    bos: str | None = None
    special: tuple[str, ...] = ()
    """Further special tokens."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    stops_there: bool = True
    """Whether generation ends where the turn does."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokens = [self.eos, *self.ends, *([self.bos] if self.bos else []), *self.special]
        tokenizer = make_bpe(self.bos, self.eos, tuple(dict.fromkeys(tokens)))
        tokenizer.chat_template = self.template
        ids = tokenizer.convert_tokens_to_ids(list(self.ends))
        set_generation(tokenizer, Generation(tuple(ids)))
        return tokenizer


def turns(user: str, assistant: str, generation: str, start: str = "", end: str = "") -> str:
    """A template of two kinds of turns, in which @q and @a stand for what is said."""
    said = "{{ m['content'] }}"
    return (
        f"{start}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{user.replace('@q', said)}"
        f"{{% else %}}{assistant.replace('@a', said)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{generation}{{% else %}}{end}{{% endif %}}"
    )


IM = "<|im_start|>user\n@q<|im_end|>\n"
IM_HEAD = "<|im_start|>assistant\n"
IM_PROMPT = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
BOS = "{{ bos_token }}"
EOS = "{{ eos_token }}"
THOUGHT = (
    "{% set parts = m['content'].split('</think>') %}"
    "{% set thought = m['reasoning_content'] or (parts[0].split('<think>')[-1] if parts[1] else '') %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ parts[-1].lstrip('\n') }}<|im_end|>\n"
)
"""As Qwen3 writes an answer: its thoughts from either place, and an empty block where there are none."""
QWEN3 = turns(
    IM,
    IM_HEAD
    + "{% if loop.last %}"
    + THOUGHT
    + "{% else %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endif %}",
    IM_HEAD + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
)
QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
R1 = turns(
    "<|User|>@q",
    "<|Assistant|>{{ m['content'].split('</think>')[-1] }}" + EOS,
    "<|Assistant|><think>\n",
    BOS,
)
R1_SPECIAL = ("<|User|>", "<|Assistant|>")
GPT_OSS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set later = messages[loop.index0 + 1:] | rejectattr('tool_calls') | map(attribute='role') | list %}"
    "{% if m['thinking'] and 'assistant' not in later and (m['tool_calls'] or loop.last) %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m['thinking'] }}<|end|>{% endif %}"
    "{% if m['tool_calls'] %}"
    "{% set call = m['tool_calls'][0]['function'] %}<|start|>assistant to=functions.{{ call['name'] }}"
    "<|channel|>commentary json<|message|>{{ call['arguments'] | tojson }}<|call|>"
    "{% elif loop.last and not add_generation_prompt %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""As gpt-oss writes its channels. What was thought before a tool call is there until there is an answer."""
COHERE_USER = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>@q<|END_OF_TURN_TOKEN|>"
COHERE_HEAD = "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
COHERE_SPECIAL = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
GEMMA = {
    "template": turns(
        "<start_of_turn>user\n@q<end_of_turn>\n",
        "<start_of_turn>model\n{{ m['content'] | trim }}<end_of_turn>\n",
        "<start_of_turn>model\n",
        BOS,
    ),
    "prompt": "<bos><start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\n",
    "response": "yes<end_of_turn>",
    "eos": "<eos>",
    "bos": "<bos>",
    "special": ("<start_of_turn>", "<end_of_turn>"),
}
PHI3 = {
    "template": turns("<|user|>\n@q<|end|>\n", "<|assistant|>\n@a<|end|>\n", "<|assistant|>\n", end=EOS),
    "prompt": "<|user|>\nq1<|end|>\n<|assistant|>\n",
    "eos": "<|endoftext|>",
    "bos": "<s>",
    "special": ("<|user|>", "<|assistant|>", "<|end|>"),
}

FORMATS = {
    "Qwen2.5": Format(
        turns(IM, IM_HEAD + "@a<|im_end|>\n", IM_HEAD, "<|im_start|>system\nYou are helpful.<|im_end|>\n"),
        "<|im_start|>system\nYou are helpful.<|im_end|>\n" + IM_PROMPT,
        "yes<|im_end|>", "<|im_end|>", QWEN_ENDS, special=("<|im_start|>",),
    ),
    "Qwen3": Format(
        QWEN3, IM_PROMPT, "<think>\n\n</think>\n\nyes<|im_end|>", "<|im_end|>", QWEN_ENDS,
        special=("<|im_start|>",),
    ),
    "Qwen3, enable_thinking=false": Format(
        QWEN3, IM_PROMPT + "<think>\n\n</think>\n\n", "yes<|im_end|>", "<|im_end|>", QWEN_ENDS,
        special=("<|im_start|>",), kwargs={"enable_thinking": False},
    ),
    "Qwen3 Thinking": Format(
        turns(IM, IM_HEAD + THOUGHT, IM_HEAD + "<think>\n"), IM_PROMPT + "<think>\n",
        "\n</think>\n\nyes<|im_end|>", "<|im_end|>", QWEN_ENDS, special=("<|im_start|>",),
    ),
    "Qwen3, inline unread": Format(
        turns(
            IM,
            IM_HEAD + "<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{{ m['content'] }}<|im_end|>\n",
            IM_HEAD + "<think>\n",
        ),
        IM_PROMPT + "<think>\n", "\n</think>\n\nyes<|im_end|>", "<|im_end|>", QWEN_ENDS,
        special=("<|im_start|>",),
    ),
    "Llama 2": Format(
        turns(BOS + "[INST] @q [/INST]", " @a " + EOS, ""), "<s>[INST] q1 [/INST]", " yes </s>", "</s>",
        ("</s>",), "<s>",
    ),
    "Llama 3": Format(
        turns(
            "<|start_header_id|>user<|end_header_id|>\n\n@q<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n@a<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n", BOS,
        ),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "yes<|eot_id|>", "<|end_of_text|>", ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "<|begin_of_text|>", ("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "Llama 4": Format(
        turns(
            "<|header_start|>user<|header_end|>\n\n@q<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n@a<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n", BOS,
        ),
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nq1<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
        "yes<|eot|>", "<|eot|>", ("<|end_of_text|>", "<|eom|>", "<|eot|>"), "<|begin_of_text|>",
        ("<|header_start|>", "<|header_end|>"),
    ),
    "Mistral v1": Format(
        turns("[INST] @q [/INST]", "@a" + EOS, "", BOS), "<s>[INST] q1 [/INST]", "yes</s>", "</s>", ("</s>",),
        "<s>",
    ),
    "Mistral v3": Format(
        turns("[INST] @q[/INST]", " @a" + EOS, "", BOS), "<s>[INST] q1[/INST]", " yes</s>", "</s>", ("</s>",),
        "<s>", ("[INST]", "[/INST]"),
    ),
    "Mistral Tekken": Format(
        turns("[INST]@q[/INST]", "@a" + EOS, "", BOS), "<s>[INST]q1[/INST]", "yes</s>", "</s>", (), "<s>",
        ("[INST]", "[/INST]"),
    ),
    "Gemma 2": Format(**GEMMA, ends=("<eos>", "<end_of_turn>")),
    "Gemma, no generation_config": Format(**GEMMA, stops_there=False),
    "Phi-3": Format(**PHI3, response="yes<|end|>", ends=("<|endoftext|>", "<|assistant|>", "<|end|>")),
    "Phi-3, no generation_config": Format(**PHI3, response="yes<|end|>\n<|endoftext|>"),
    "Phi-4": Format(
        turns(
            "<|im_start|>user<|im_sep|>@q<|im_end|>", "<|im_start|>assistant<|im_sep|>@a<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
        ),
        "<|im_start|>user<|im_sep|>q1<|im_end|><|im_start|>assistant<|im_sep|>", "yes<|im_end|>",
        "<|endoftext|>", ("<|endoftext|>", "<|im_end|>"), "<|endoftext|>", ("<|im_start|>", "<|im_sep|>"),
    ),
    "Zephyr": Format(
        turns("<|user|>\n@q" + EOS + "\n", "<|assistant|>\n@a" + EOS + "\n", "<|assistant|>\n"),
        "<|user|>\nq1</s>\n<|assistant|>\n", "yes</s>", "</s>", ("</s>",), "<s>",
    ),
    "DeepSeek-V2": Format(
        turns("User: @q\n\n", "Assistant: @a" + EOS, "Assistant:", BOS),
        "<|begin_of_sentence|>User: q1\n\nAssistant:", " yes<|end_of_sentence|>", "<|end_of_sentence|>",
        ("<|end_of_sentence|>",), "<|begin_of_sentence|>",
    ),
    "DeepSeek-R1": Format(
        R1, "<|begin_of_sentence|><|User|>q1<|Assistant|>", "yes<|end_of_sentence|>",
        "<|end_of_sentence|>", ("<|end_of_sentence|>",), "<|begin_of_sentence|>", R1_SPECIAL,
    ),
    "DeepSeek-V3.1": Format(
        turns("<|User|>@q", "<|Assistant|></think>@a" + EOS, "<|Assistant|></think>", BOS),
        "<|begin_of_sentence|><|User|>q1<|Assistant|></think>", "yes<|end_of_sentence|>",
        "<|end_of_sentence|>", ("<|end_of_sentence|>",), "<|begin_of_sentence|>", R1_SPECIAL,
    ),
    "gpt-oss": Format(
        GPT_OSS, "<|start|>user<|message|>q1<|end|><|start|>assistant",
        "<|channel|>final<|message|>yes<|return|>", "<|return|>", ("<|return|>", "<|endoftext|>", "<|call|>"),
        "<|startoftext|>", ("<|start|>", "<|message|>", "<|channel|>"),
    ),
    "Command-R": Format(
        turns(COHERE_USER, COHERE_HEAD + "@a<|END_OF_TURN_TOKEN|>", COHERE_HEAD, BOS),
        "<BOS_TOKEN>" + COHERE_USER.replace("@q", "q1") + COHERE_HEAD,
        "yes<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", ("<|END_OF_TURN_TOKEN|>",), "<BOS_TOKEN>",
        COHERE_SPECIAL,
    ),
    "Command-R7B": Format(
        turns(
            COHERE_USER, COHERE_HEAD + "<|START_RESPONSE|>@a<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            COHERE_HEAD, BOS,
        ),
        "<BOS_TOKEN>" + COHERE_USER.replace("@q", "q1") + COHERE_HEAD,
        "<|START_RESPONSE|>yes<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
        ("<|END_OF_TURN_TOKEN|>",), "<BOS_TOKEN>",
        (*COHERE_SPECIAL, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    "Granite": Format(
        turns(
            "<|start_of_role|>user<|end_of_role|>@q<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>@a<|end_of_text|>\n",
            "<|start_of_role|>assistant<|end_of_role|>",
        ),
        "<|start_of_role|>user<|end_of_role|>q1<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        "yes<|end_of_text|>", "<|end_of_text|>", ("<|end_of_text|>",), "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "OLMo 2": Format(
        turns(
            "<|user|>\n@q\n",
            "<|assistant|>\n@a" + EOS + "{% if not loop.last %}{{ '\n' }}{% endif %}",
            "<|assistant|>\n", BOS,
        ),
        "<|endoftext|><|user|>\nq1\n<|assistant|>\n", "yes<|endoftext|>", "<|endoftext|>", (),
        "<|endoftext|>",
    ),
    "Falcon": Format(
        turns("User: @q\n\n", "Assistant: @a\n\n", "Assistant:"), "User: q1\n\nAssistant:",
        " yes<|endoftext|>", "<|endoftext|>", ("<|endoftext|>",),
    ),
    "Yi": Format(
        turns(IM, IM_HEAD + "@a<|im_end|>\n", IM_HEAD), IM_PROMPT, "yes<|im_end|>", "<|im_end|>",
        ("<|im_end|>", "<|endoftext|>"), "<|startoftext|>", ("<|im_start|>",),
    ),
    "InternLM2": Format(
        turns(IM, IM_HEAD + "@a<|im_end|>\n", IM_HEAD, BOS), "<s>" + IM_PROMPT, "yes<|im_end|>", "</s>",
        ("</s>", "<|im_end|>"), "<s>", ("<|im_start|>",),
    ),
    "StableLM": Format(
        turns("<|user|>\n@q<|endoftext|>\n", "<|assistant|>\n@a<|endoftext|>\n", "<|assistant|>\n"),
        "<|user|>\nq1<|endoftext|>\n<|assistant|>\n", "yes<|endoftext|>", "<|endoftext|>",
        ("<|endoftext|>",), "<|endoftext|>",
    ),
    "SmolLM2": Format(
        turns(IM, IM_HEAD + "@a<|im_end|>\n", IM_HEAD), IM_PROMPT, "yes<|im_end|>", "<|im_end|>",
        ("<|im_end|>",), "<|im_start|>",
    ),
    "SmolLM3": Format(
        turns(
            IM, IM_HEAD + "@a<|im_end|>\n",
            IM_HEAD + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
        ),
        IM_PROMPT, "yes<|im_end|>", "<|im_end|>", ("<|im_end|>",), special=("<|im_start|>",),
    ),
    "Nemotron": Format(
        turns(
            "<extra_id_1>User\n@q\n", "<extra_id_1>Assistant\n@a\n", "<extra_id_1>Assistant\n",
            "<extra_id_0>System\n\n",
        ),
        "<extra_id_0>System\n\n<extra_id_1>User\nq1\n<extra_id_1>Assistant\n", "yes</s>", "</s>", ("</s>",),
        "<s>", ("<extra_id_0>", "<extra_id_1>"),
    ),
    "Vicuna": Format(
        turns("USER: @q ", "ASSISTANT: @a" + EOS, "ASSISTANT:", BOS), "<s>USER: q1 ASSISTANT:", " yes</s>",
        "</s>", ("</s>",), "<s>",
    ),
    "GLM-4": Format(
        turns("<|user|>\n@q", "<|assistant|>\n@a", "<|assistant|>", "[gMASK]<sop>"),
        "[gMASK]<sop><|user|>\nq1<|assistant|>", "\nyes<|user|>", "<|endoftext|>",
        ("<|endoftext|>", "<|user|>", "<|observation|>"), special=("[gMASK]", "<sop>", "<|assistant|>"),
    ),
}  # fmt: skip
