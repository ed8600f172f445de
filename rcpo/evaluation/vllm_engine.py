"""A model in vLLM, in the place of transformers' `generate` (`engine=vllm`): token ids in, token ids out, as
`rcpo.evaluation.decoding` has them; and lm-eval's own `vllm` model of the same weights, for its tasks.

vLLM computes in a process of its own, which ends with `close`. Adapters go through its LoRA, beside the
base's weights. Does not render or decode text, and shows no images. vLLM is imported when a model is first
asked."""

import contextlib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from rcpo.common.errors import UserError, first_line
from rcpo.config.schema import ModelConfig
from rcpo.evaluation.decoding import Answer, Decoding, Task, Writer, up_to_stop
from rcpo.evaluation.engines import VLLM
from rcpo.models.adapter_files import read_adapter_config
from rcpo.models.load import model_place, save_tokenizer

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, for which vLLM has room (vllm.config.lora.MaxLoRARanks)."""
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of its environment, where the user has said nothing: no log but of faults, and nothing is sent to its
authors."""
LONGEST_SAID = 10**6
"""Bytes that are looked at for what went wrong."""
_SAID = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception): (.+)")


class VllmModel(Writer):
    """Weights and the engine that runs them; at most one engine is there at a time."""

    def __init__(self, name: str, config: ModelConfig, adapter: str | None, device: str) -> None:
        """`name` is for errors. Raises UserError where the adapter cannot be read, or vLLM does not take
        it."""
        self._name, self._adapter = name, adapter
        self._place = model_place(config.path, config.allow_pickle, revision=config.revision)
        self._options: dict[str, Any] = {
            "dtype": config.dtype,
            "trust_remote_code": config.trust_remote_code,
            "generation_config": VLLM,  # its own defaults: the folder's may ask for penalties
            "enforce_eager": device == "cpu",  # where compiling takes longer than short answers
            "seed": 0,
        }
        if adapter is not None:
            self._options["max_lora_rank"] = lora_room(adapter)
        self._engine: Any = None
        self._harness: Any = None
        self._tokens = contextlib.ExitStack()
        self._said = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # its processes write into it until they end

    @property
    def positions(self) -> int | None:
        return int(self._llm.llm_engine.model_config.max_model_len)

    def write(
        self, tasks: Sequence[Task], decoding: Decoding, stop_ids: Sequence[int], watched: Sequence[int]
    ) -> Iterator[dict[int, Answer]]:
        stops, size = set(stop_ids), decoding.answers_per_batch
        for start in range(0, len(tasks), size):
            members = tasks[start : start + size]
            prompts = [{"prompt_token_ids": task.asked.ids} for task in members]
            settings = [sampling(task, decoding, stop_ids, watched) for task in members]
            llm = self._llm
            with self.one_line_faults("write answers"):
                found = llm.generate(prompts, settings, use_tqdm=False, lora_request=self._lora)
            yield {
                task.place: _answer(output.outputs[0], stops, watched)
                for task, output in zip(members, found, strict=True)
            }

    def for_harness(self, tokenizer: PreTrainedTokenizerBase, batch: int) -> Any:
        """lm-eval's model (lm_eval.models.vllm_causallms.VLLM), with this tokenizer and its template."""
        if self._harness is None:
            self.close()
            folder = Path(self._tokens.enter_context(tempfile.TemporaryDirectory()))
            save_tokenizer(tokenizer, folder)
            with self._loading():
                from lm_eval.models import vllm_causallms

                self._harness = vllm_causallms.VLLM(
                    self._place, tokenizer=str(folder), lora_local_path=self._adapter, batch_size=batch,
                    **self._options,
                )  # fmt: skip
        return self._harness

    def close(self) -> None:
        """End the engine's process; what it took is free then."""
        engine = self._engine if self._harness is None else self._harness.model
        self._engine = self._harness = None
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
        self._tokens.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _llm(self) -> Any:
        if self._engine is None:
            self.close()
            with self._loading():
                from vllm import LLM

                self._engine = LLM(
                    self._place, skip_tokenizer_init=True, enable_lora=self._adapter is not None,
                    **self._options,
                )  # fmt: skip
        return self._engine

    @cached_property
    def _lora(self) -> Any:
        if self._adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, self._adapter)

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """What is said on stderr, here and later by the processes that are started, goes to a file."""
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        with self.one_line_faults("load it"), _stderr_into(self._said.fileno()):
            yield

    @contextlib.contextmanager
    def one_line_faults(self, doing: str) -> Iterator[None]:
        """Raise UserError for whatever vLLM raises. What went wrong in a process of its own, that process has
        said on stderr alone."""
        descriptor = self._said.fileno()
        start = os.fstat(descriptor).st_size
        try:
            yield
        except UserError:
            raise
        # Its exceptions are of many classes, of other libraries too.
        except Exception as error:
            said = os.pread(descriptor, LONGEST_SAID, start).decode("utf-8", "replace")
            why = (_SAID.findall(said) or [first_line(error)])[0].strip()[:300]
            raise UserError(
                f"engine={VLLM}: {self._name}: vLLM cannot {doing} ({why}); leave engine={VLLM} out, or give "
                "another model"
            ) from error


def lora_room(adapter: str) -> int:
    """The least rank for which vLLM has room that is the adapter's or above it. Raises UserError where there
    is none."""
    entries = read_adapter_config(adapter)
    rank = max([entries["r"], *(entries.get("rank_pattern") or {}).values()])
    room = next((each for each in RANKS if each >= rank), None)
    if room is None:
        raise UserError(
            f"engine={VLLM}: {adapter} has rank {rank}, and vLLM takes adapters up to {RANKS[-1]}; type rcpo "
            f"export RUN OUT --merge and give OUT, or leave engine={VLLM} out"
        )
    return room


def sampling(task: Task, decoding: Decoding, stop_ids: Sequence[int], watched: Sequence[int]) -> Any:
    """vLLM's SamplingParams of an answer: it ends at `stop_ids` alone, and is drawn by a seed of its own."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=decoding.temperature,
        top_p=decoding.top_p if decoding.temperature > 0 else 1.0,
        seed=seed_of(task.asked.seed) if decoding.temperature > 0 else None,
        max_tokens=task.num_new,
        stop_token_ids=list(stop_ids),
        ignore_eos=True,
        detokenize=False,
        logprob_token_ids=list(watched) or None,
    )


def seed_of(text: str) -> int:
    """63 bits of the text that an answer's draws are seeded by."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _answer(output: Any, stops: set[int], watched: Sequence[int]) -> Answer:
    answer = up_to_stop(list(output.token_ids), stops)
    if not watched:
        return answer
    first = output.logprobs[0]
    return answer._replace(watched=tuple(float(first[token].logprob) for token in watched))


@contextlib.contextmanager
def _stderr_into(descriptor: int) -> Iterator[None]:
    """Of this process and of those that it starts."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
