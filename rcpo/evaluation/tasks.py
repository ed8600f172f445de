"""Tasks by name, for one model after another: what is known already is not evaluated again.

`arithmetic` and `yes_no` are rcpo's own; every other name is lm-eval's, or of a folder of the user's. Called
by `rcpo.commands.evaluate` and, at the end of a run, by `rcpo.launch.at_end`."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from rcpo.common.code_version import code_hash
from rcpo.common.errors import UserError
from rcpo.config.evaluation import ASKS_TEXT, OF_QUESTIONS, OWN, YES_NO, EvaluationConfig
from rcpo.evaluation import arithmetic
from rcpo.evaluation.engines import TRANSFORMERS
from rcpo.evaluation.harness import Harness
from rcpo.evaluation.kept import keep, kept, turn
from rcpo.evaluation.results import INITIAL, Results, TaskResult, result_of
from rcpo.evaluation.subject import Loaded, Subject, initial_of
from rcpo.evaluation.yes_no import Questions

KIND = "evaluation"
"""Of what is kept of initial models."""
Found = tuple[TaskResult, list[dict[str, Any]]]
"""Scores, and a row a question."""


class Evaluation:
    """One `rcpo evaluate`: tasks and settings, and what was found of models that several runs share."""

    def __init__(self, asked: EvaluationConfig) -> None:
        """Raises UserError for a task that there is not, and for one without its questions."""
        self.tasks, self._batch, self._is_chat = list(asked.tasks), asked.batch, asked.chat
        self._known: dict[str, Found] = {}
        for key in OF_QUESTIONS if YES_NO not in asked.tasks else ():
            if (given := getattr(asked, key)) is not None:
                raise UserError(
                    f"{key}={given}: no task asks questions of yours; type tasks={YES_NO} as well, or leave "
                    "it out"
                )
        self._questions = Questions(asked) if YES_NO in asked.tasks else None
        self._harness: Harness | None = None
        if theirs := [task for task in asked.tasks if task not in OWN]:
            self._harness = Harness(theirs, asked.folder, asked.limit, asked.chat)

    def of(self, subject: Subject, again: bool, say: Callable[[str], None]) -> dict[str, TaskResult]:
        """Results of all tasks, the run's own first; written into the run's folder task by task."""
        with contextlib.ExitStack() as at_end:
            return self._of(subject, again, say, at_end)

    def _of(
        self, subject: Subject, again: bool, say: Callable[[str], None], at_end: contextlib.ExitStack
    ) -> dict[str, TaskResult]:
        by = "" if subject.engine == TRANSFORMERS else f", by {subject.engine}"
        results = None if subject.run is None else Results(subject.run.path)
        before = {} if results is None or again else results.of(subject.when)
        found, loaded = {}, None
        for task in self.tasks:
            made_with = self._made_with(subject, task)
            result = before.get(task)
            if result is None or result.made_with != made_with:
                key = repr((task, sorted(made_with.items())))
                is_shared = subject.when == INITIAL  # by runs of other processes, too
                with turn(KIND, _versioned(key)) if is_shared else contextlib.nullcontext():
                    known = self._known.get(key) or (_shared(key) if is_shared and not again else None)
                    if known is None:
                        self.refuse(subject, task)
                        say(f"{subject.name} {subject.when}: {task}{by}")
                        if loaded is None:
                            loaded = Loaded(subject, may_see=True)
                            at_end.enter_context(loaded.ending())
                            at_end.callback(loaded.close)
                        metrics, questions = self._ask(task, loaded)
                        source = (
                            self._questions.source if task == YES_NO and self._questions is not None else None
                        )
                        known = TaskResult(metrics, len(questions), made_with, source), questions
                        if is_shared:
                            keep(KIND, _versioned(key), {"result": asdict(known[0]), "questions": questions})
                self._known[key] = result, questions = known
                if results is not None:
                    results.add(subject.when, task, result, questions)
            found[task] = result
        return found

    @staticmethod
    def before(subject: Subject) -> dict[str, TaskResult]:
        """What the run's folder has, of whatever weights and settings."""
        return {} if subject.run is None else dict(Results(subject.run.path).of(subject.when))

    def knows(self, subject: Subject) -> bool:
        """Whether the run's folder has all results."""
        before = self.before(subject)
        return all(
            task in before and before[task].made_with == self._made_with(subject, task) for task in self.tasks
        )

    def refuse(self, subject: Subject, task: str) -> None:
        """Raise UserError where questions are user turns and the model has no chat template, or where they
        show images and it sees none, or the other way round; before its weights are loaded."""
        if subject.only_sees and task in ASKS_TEXT:
            raise UserError(
                f"tasks={task}: asks text alone, and {subject.name} sees images; type tasks={YES_NO} "
                "questions=FILE, or a task of lm-eval's"
            )
        if task == YES_NO and self._questions is not None:
            self._questions.refuse(subject)
        if task not in OWN and self._harness is not None:
            self._harness.refuse(task, subject)
        if (task in OWN or self._is_chat) and subject.tokenizer(may_see=True).chat_template is None:
            what = f"tasks={task}" if task in OWN else "chat=yes"
            raise UserError(
                f"{what}: asks user turns, and {subject.name} has no chat template; type chat_template=plain"
                + ("" if task in OWN else ", or chat=no")
            )

    def _ask(self, task: str, loaded: Loaded) -> Any:
        if task == "arithmetic":
            return arithmetic.ask(loaded, self._batch)
        if task == YES_NO:
            assert self._questions is not None
            return self._questions.ask(loaded, self._batch)
        assert self._harness is not None
        return self._harness.ask(task, loaded, self._batch)

    def _made_with(self, subject: Subject, task: str) -> dict[str, Any]:
        data: Any = None
        if task == "arithmetic" and subject.config is not None and subject.config.data.source == "arithmetic":
            data = [subject.config.data.eval_pairs, subject.config.data.seed]
        if task == YES_NO and self._questions is not None:
            data = self._questions.digest
        template = [subject.model.chat_template, subject.model.chat_template_kwargs]
        made_with = {"weights": subject.fingerprint, "data": data, "template": template}
        made_with["engine"] = subject.engine
        if task in OWN:
            return made_with
        assert self._harness is not None
        return made_with | {"task": self._harness.digest(task)}


def _shared(key: str) -> Found | None:
    """What another process has found."""
    try:
        tree = kept(KIND, _versioned(key)) or {}
        return result_of(tree["result"]), list(tree["questions"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _versioned(key: str) -> str:
    """Another rcpo may ask otherwise."""
    return f"{code_hash()} {key}"


def with_initial(subjects: Sequence[Subject]) -> list[Subject]:
    """The models that runs started from, before the runs: each run has its own entry, of one evaluation."""
    return [
        *(initial_of(each) for each in subjects if each.run is not None and each.when != INITIAL),
        *subjects,
    ]
