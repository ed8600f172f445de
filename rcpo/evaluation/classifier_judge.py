"""A local reward model as the judge: a sequence classifier with one number, which scores each answer by
itself. Order and cost play no part."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rcpo.common.errors import UserError, first_line
from rcpo.evaluation.answer_files import Duel
from rcpo.evaluation.judge import FIRST, SECOND, TIE
from rcpo.evaluation.win_rate import Verdicts


class ClassifierJudge:
    def __init__(self, path: str) -> None:
        """Raises UserError where it cannot be loaded or gives another number of scores."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            model, found = AutoModelForSequenceClassification.from_pretrained(path, output_loading_info=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"model={path}: cannot be loaded ({first_line(error)}); give a folder or a hub id of a "
                "reward model"
            ) from None
        if found["missing_keys"]:
            raise UserError(
                f"model={path}: has no {', '.join(sorted(found['missing_keys']))}, which would be drawn at "
                "random; give a reward model, which has it"
            )
        if model.config.num_labels != 1:
            raise UserError(
                f"model={path}: gives {model.config.num_labels} numbers, and a reward is one; give a model "
                "with num_labels=1"
            )
        if not self._tokenizer.chat_template:
            raise UserError(f"model={path}: has no chat template; give a reward model that has one")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(device).eval()
        self._positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.name = Path(path).name

    @torch.inference_mode()
    def score(self, duel: Duel, answer: str) -> float | None:
        """None where the conversation is longer than the model's context, or the score is not finite."""
        turns = [*duel.prompt, {"role": "assistant", "content": answer}]
        text = self._tokenizer.apply_chat_template(turns, tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        if self._positions is not None and ids.shape[1] > self._positions:
            return None
        value = float(self._model(input_ids=ids.to(self._model.device)).logits[0, 0])
        return value if math.isfinite(value) else None

    def ask(self, duels: Sequence[Duel], advance: Callable[[int], None]) -> list[Verdicts]:
        """The same verdict in both orders."""
        found: list[Verdicts] = []
        known: dict[str, float | None] = {}  # of a grid many are judged against the same answer

        def score(duel: Duel, answer: str) -> float | None:
            key = json.dumps([duel.prompt, answer])
            if key not in known:
                known[key] = self.score(duel, answer)
            return known[key]

        for duel in duels:
            a, b = score(duel, duel.a), score(duel, duel.b)
            advance(1)
            if a is None or b is None:
                found.append((None, None))
            elif a == b:
                found.append((TIE, TIE))
            else:
                found.append((FIRST, SECOND) if a > b else (SECOND, FIRST))
        if all(both == (None, None) for both in found):
            raise UserError(
                f"model={self.name}: every conversation is longer than its {self._positions} positions, or "
                "has a score that is not finite; give another reward model"
            )
        return found
