"""What is evaluated: the model of a run at its end or at a checkpoint, or any model; an adapter with its
base.

Owns which weights, tokenizer and chat settings a word stands for. Loads no weights before `load`."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rcpo.common.errors import UserError
from rcpo.config.names import last_part
from rcpo.config.resolved import ResolvedConfig
from rcpo.config.schema import LoraConfig, ModelConfig
from rcpo.evaluation.decoding import Writer
from rcpo.evaluation.engines import TRANSFORMERS
from rcpo.evaluation.prompts import Asking
from rcpo.evaluation.results import FINAL, INITIAL
from rcpo.evaluation.vllm_engine import VllmModel
from rcpo.models.adapter_files import CONFIG_FILE
from rcpo.models.load import load_frozen_model, load_tokenizer, model_place, read_config
from rcpo.models.merge import merged_model
from rcpo.models.places import is_adapter
from rcpo.models.vision import is_vision, reads_images
from rcpo.ranks.stopping import ending
from rcpo.reference.cache import weights_fingerprint
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import open_run
from rcpo.training.checkpoint import check_manifest, checkpoint_path, complete_checkpoints, step_of


@dataclass(frozen=True)
class Subject:
    """A model to evaluate; its weights are not loaded yet."""

    name: str
    """Of the run, or of the model."""
    model: ModelConfig
    adapter: str | None = None
    """Folder of an adapter that goes into `model`."""
    run: RunFolder | None = None
    config: ResolvedConfig | None = None
    """Of the run."""
    when: str = FINAL
    """Which of the run's models: `FINAL`, or step-N."""
    engine: str = TRANSFORMERS
    """What runs it where it answers, one of `rcpo.evaluation.engines.ENGINES`."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def system(self) -> str:
        """What training does with system turns: keep, merge or drop."""
        return "keep" if self.config is None else self.config.data.system

    @cached_property
    def sees(self) -> bool:
        """Whether it may be shown images."""
        return reads_images(read_config(self.model))

    @cached_property
    def only_sees(self) -> bool:
        """Whether it is a vision-language model and nothing else: text alone is not asked of it."""
        return is_vision(read_config(self.model))

    def tokenizer(self, may_see: bool = False) -> PreTrainedTokenizerBase:
        """Raises UserError for a model that is for images alone, unless it `may_see`."""
        if self.only_sees and not may_see:
            raise UserError(
                f"{self.name}: sees images, and this is asked of models of text alone; `rcpo generate`, and "
                "`rcpo evaluate` with tasks=yes_no, take it"
            )
        return load_tokenizer(self.model)

    def load(self) -> PreTrainedModel:
        """The model, for evaluation alone."""
        config = _with_dtype(self.model, self.device)
        model = load_frozen_model(config) if self.adapter is None else merged_model(self.adapter, config)
        return model.to(self.device).eval()

    def in_vllm(self) -> VllmModel:
        """The model in vLLM, which loads it when it is first asked. Raises UserError for an adapter that
        cannot be read."""
        return VllmModel(self.name, _with_dtype(self.model, self.device), self.adapter, self.device.type)

    @contextlib.contextmanager
    def writer(self) -> Iterator[PreTrainedModel | Writer]:
        """What writes its answers: the model, or its engine, which ends with the context."""
        if self.engine == TRANSFORMERS:
            yield self.load()
            return
        with ending(), self.in_vllm() as model:
            yield model

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same weights and dtype, wherever they lie; of a hub model by its commit."""
        lora = LoraConfig(adapter=self.adapter)
        config = dataclasses.replace(_with_dtype(self.model, self.device), lora=lora)
        return weights_fingerprint(config)


def find_subject(
    word: str, step: str | None = None, chat_template: str | None = None, engine: str = TRANSFORMERS
) -> Subject:
    """What `word` stands for: a run folder (its model at the end, or at `step`; 0 is the model that it
    started from), a model folder, an adapter's folder, a hub id or builtin:tiny. Raises UserError where there
    is no such model; `chat_template` is as in model.chat_template."""
    if (Path(word) / "config.yaml").is_file():
        subject = _of_run(word, step)
    elif step is not None:
        raise UserError(
            f"step={step}: {word} is no run folder, and only runs have checkpoints; leave step out"
        )
    else:
        subject = _of_model(word)
    subject = dataclasses.replace(subject, engine=engine)
    if chat_template is not None:
        subject = dataclasses.replace(
            subject, model=dataclasses.replace(subject.model, chat_template=chat_template)
        )
    return subject


class Loaded:
    """A subject's model, and its tokenizer with what prompts are made of. Its weights are loaded when they
    are first asked for, by the one engine or the other."""

    def __init__(self, subject: Subject, may_see: bool = False) -> None:
        self.subject, self.tokenizer = subject, subject.tokenizer(may_see)
        self.asking = Asking(self.tokenizer, subject.model.chat_template_kwargs, None, subject.system)

    @cached_property
    def model(self) -> PreTrainedModel:
        """In transformers."""
        return self.subject.load()

    @cached_property
    def in_vllm(self) -> VllmModel:
        return self.subject.in_vllm()

    @property
    def writer(self) -> PreTrainedModel | Writer:
        """What writes its answers."""
        return self.model if self.subject.engine == TRANSFORMERS else self.in_vllm

    def ending(self) -> contextlib.AbstractContextManager[None]:
        """While open, a signal ends the command in order, where an engine has processes of its own."""
        return contextlib.nullcontext() if self.subject.engine == TRANSFORMERS else ending()

    def close(self) -> None:
        """End an engine that has processes of its own."""
        if "in_vllm" in self.__dict__:
            self.in_vllm.close()


def initial_of(subject: Subject) -> Subject:
    """The model that the run of `subject` started from."""
    assert subject.config is not None
    return dataclasses.replace(start_of(subject.config), run=subject.run, engine=subject.engine)


def start_of(config: ResolvedConfig) -> Subject:
    """The model that a run of this config starts from, before there is a run."""
    model = config.model
    return Subject(config.name, _plain(model), model.lora.adapter, config=config, when=INITIAL)


def _of_run(word: str, step: str | None) -> Subject:
    run, config = open_run(word)
    subject = Subject(config.name, _plain(config.model), run=run, config=config)
    if step is None:
        if not run.final.is_dir():
            raise UserError(f"{word}: has no final/ yet; {_checkpoints(run)}")
        return _with_weights(subject, run.final)
    if not step.isdecimal():
        raise UserError(f"step={step}: must be a whole number; {_checkpoints(run)}")
    if int(step) == 0:
        return initial_of(subject)
    place = checkpoint_path(run, int(step))
    if not (place / "manifest.json").is_file():
        raise UserError(f"step={step}: {word} has no checkpoint of that step; {_checkpoints(run)}")
    check_manifest(place)
    return _with_weights(dataclasses.replace(subject, when=place.name), place / "model")


def _checkpoints(run: RunFolder) -> str:
    steps = sorted({step_of(path) for path in complete_checkpoints(run)})
    if not steps:
        return f"type step=0 for the model that it started from, or `rcpo resume {run.path}`"
    return f"type step=N, one of 0, {', '.join(map(str, steps))}"


def _with_weights(subject: Subject, folder: Path) -> Subject:
    """The subject with the weights in `folder`: a whole model's, or an adapter's beside the run's base."""
    if is_adapter(folder):
        return dataclasses.replace(subject, adapter=str(folder))
    # The folder's tokenizer has the run's chat template.
    model = dataclasses.replace(subject.model, path=str(folder), revision=None, chat_template=None)
    return dataclasses.replace(subject, model=model, adapter=None)


def _plain(model: ModelConfig) -> ModelConfig:
    """The model without what training adds."""
    return dataclasses.replace(
        model, lora=LoraConfig(rank=None), quantization=None, gradient_checkpointing=False, kernels=None,
        compile=False, attention=None,
    )  # fmt: skip


def _of_model(word: str) -> Subject:
    if not is_adapter(Path(word)):
        model = ModelConfig(path=word)
        model_place(word)
        return Subject(last_part(word), model)
    try:
        base = json.loads((Path(word) / CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise UserError(f"{word}: its {CONFIG_FILE} does not name a base model; give the run folder")
    return Subject(last_part(word), ModelConfig(path=base), adapter=word)


def _with_dtype(model: ModelConfig, device: torch.device) -> ModelConfig:
    if model.dtype != "auto":
        return model
    return dataclasses.replace(model, dtype="bfloat16" if device.type == "cuda" else "float32")
