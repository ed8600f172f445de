"""A model's answers to prompts that are asked once: a file whose name is a digest of all that makes them.

Of a trained model in RUN/evaluation/answers/, of the model that runs started from in RCPO_CACHE/answers, for
all of them. Called by `rcpo judge` of runs; `rcpo generate` writes where its user says."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from rcpo.common.errors import UserError
from rcpo.common.files import cache_dir, write_atomically
from rcpo.evaluation.decoding import Decoding
from rcpo.evaluation.forms import written
from rcpo.evaluation.generation import Partial, asked_first, digest_of, generate
from rcpo.evaluation.prompts import Asking, Prompt
from rcpo.evaluation.results import FOLDER, INITIAL
from rcpo.evaluation.subject import Subject
from rcpo.models.load import read_config


class Shown(Protocol):
    """A bar over so many answers of a model; gives what to call with how many more are done."""

    def __call__(self, name: str, total: int) -> "AbstractContextManager[Any]": ...


def answers_file(
    subject: Subject, prompts: Sequence[Prompt], where: str, max_new_tokens: int, batch: int, shown: Shown
) -> Path:
    """Greedy answers as `rcpo generate` writes them with format=jsonl; generated where they are not there,
    from where an earlier generation stopped. `where` is what the user typed for the prompts. Raises UserError
    for a prompt that cannot be asked, or where the disk is full."""
    model = subject.model
    made_with = {
        "prompts": digest_of(prompts), "weights": subject.fingerprint, "max_new_tokens": max_new_tokens,
        "template": [model.chat_template, model.chat_template_kwargs], "system": subject.system,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]
    is_own = subject.run is not None and subject.when != INITIAL
    folder = subject.run.path / FOLDER / "answers" if is_own and subject.run else cache_dir() / "answers"
    file = folder / f"{digest}.jsonl"
    if file.is_file():
        return file
    asking = Asking(subject.tokenizer(), model.chat_template_kwargs, None, subject.system)
    positions = getattr(read_config(model).get_text_config(), "max_position_embeddings", None)
    first = asked_first(asking, prompts, where, positions)
    partial = Partial(file, made_with, start_again=True)
    decoding = Decoding(max_new_tokens=max_new_tokens, answers_per_batch=batch)
    total = sum(1 + len(prompt.later) for prompt in prompts)
    with shown(f"{subject.name} {subject.when}", total) as advance:
        answered = generate(subject.load(), asking, prompts, first, decoding, 1, 0, partial, advance)
    try:
        write_atomically(file, written("jsonl", answered, subject.name))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror}); make room and type the same again: the answers "
            "are kept beside it"
        ) from None
    partial.remove()
    return file
