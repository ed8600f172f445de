"""`rcpo export RUN OUT [step=N] [--merge] [--transformers4] [--push ORG/NAME]`: a Hugging Face model folder
from a checkpoint, at any ZeRO stage.

Every checkpoint holds its whole weights as safetensors, so this is a checked copy: no engine, no pickle. An
adapter is merged into its base on request.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError
from rcpo.common.files import path_beside, remove, replacing

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig
    from rcpo.runs.folder import RunFolder

NAMED = ("best", "final")
"""Folders of a run that step= may name."""


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Write the model of a run's newest checkpoint, or of one step, as a Hugging Face model folder:
safetensors with tokenizer, config and model card, which transformers loads with
AutoModelForCausalLM.from_pretrained(OUT), a model that sees with AutoModelForImageTextToText. A
run that is done has its final model in RUN/final already; without a checkpoint, that is what is
exported. These folders are for transformers 5.

--push sends OUT to the Hugging Face hub and asks nothing: the token is read from HF_TOKEN, and a
new repository is private but with --public."""
    parser.epilog = """\
examples:
  rcpo export runs/dpo-on-1 my-model
  rcpo export runs/dpo-on-1 my-model step=200
  rcpo export runs/dpo-on-1 my-model step=best           (of train.keep_best)
  rcpo export runs/lora-1 my-model --merge
  rcpo export runs/dpo-on-1 my-model --push me/my-model --dry-run
  rcpo export runs/dpo-on-1 my-model --transformers4"""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new folder")
    parser.add_argument(
        "step",
        metavar="step=N",
        nargs="?",
        help="the checkpoint of that step; step=best, step=final: RUN/best, ...",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="make a whole model of an adapter and its base (model.lora.save=adapter)",
    )
    parser.add_argument(
        "--transformers4",
        action="store_true",
        help="write config and tokenizer as transformers 4 reads them; of some architectures only",
    )
    parser.add_argument("--push", metavar="ORG/NAME", help="send it to that repository of the hub")
    parser.add_argument("--public", action="store_true", help="with --push: a new repository is public")
    parser.add_argument(
        "--dry-run", action="store_true", help="print files, sizes and repository; write nothing"
    )


def run(options: argparse.Namespace) -> int:
    """Export; returns the exit code. Raises UserError when there is nothing to export or OUT exists."""
    from rcpo.models.push import listed, push_folder, refuse_unpushable
    from rcpo.models.transformers4 import has_capped_attention
    from rcpo.runs.frozen import refuse_no_run

    out, step = options.out, options.step
    if step is not None and not step.startswith("step="):
        raise UserError(f"{step}: must be the step of a checkpoint; type step=N")
    if options.push is not None and not options.dry_run:
        refuse_unpushable(options.push, options.public)
    if options.public and options.push is None:
        raise UserError("--public: says how --push makes a repository; type --push ORG/NAME as well")
    if out.exists():
        raise UserError(f"{out}: exists; export writes a new folder only, give another name")
    refuse_no_run(options.run)
    run_folder, config, folder = _model_folder(
        options.run, None if step is None else step.removeprefix("step=")
    )
    if options.merge:
        _refuse_unmergeable(run_folder, config, folder)
    if options.dry_run:
        files = _files_of(options, run_folder, config, folder)
        print(f"would write {out} from {folder}:", *listed(files), sep="\n")
        if options.push is not None:
            kind = "public" if options.public else "private"
            print(f"would push to {options.push} ({kind} if it is new)")
        return 0
    try:
        with replacing(out) as beside:
            _make(options, run_folder, config, folder, beside)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    print(f"wrote {out} from {folder}")
    if options.transformers4 and has_capped_attention(out):
        print("transformers 4 caps this model's attention with attn_implementation='eager' alone")
    if options.push is not None:
        message = f"{config.name}, step {_step_of(run_folder, folder)}, by rcpo"
        print(f"pushed to {push_folder(out, options.push, options.public, message)}")
    return 0


def _make(
    options: argparse.Namespace, run_folder: "RunFolder", config: "ResolvedConfig", folder: Path, place: Path
) -> None:
    """Write the whole folder to `place`."""
    from rcpo.models.merge import write_merged
    from rcpo.models.transformers4 import for_transformers4

    if options.merge:
        write_merged(folder, config.model, place)
    else:
        shutil.copytree(folder, place)
    if options.transformers4:
        for_transformers4(place)
    (place / "README.md").write_text(_card(options, run_folder, config, folder), encoding="utf-8")


def _files_of(
    options: argparse.Namespace, run_folder: "RunFolder", config: "ResolvedConfig", folder: Path
) -> dict[str, int]:
    """Names and sizes of what would be written. What has to be made to be known is made beside OUT, and
    removed; a copy is not."""
    from rcpo.models.push import sizes_of

    if not options.merge and not options.transformers4:
        card = _card(options, run_folder, config, folder).encode()
        return sizes_of(folder) | {"README.md": len(card)}
    beside = path_beside(options.out)
    try:
        _make(options, run_folder, config, folder, beside)
        return sizes_of(beside)
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written ({error.strerror})") from None
    finally:
        remove(beside)


def _card(
    options: argparse.Namespace, run_folder: "RunFolder", config: "ResolvedConfig", folder: Path
) -> str:
    """README.md of the folder: the run up to its step, and where the folder will be."""
    from rcpo.models.processors import has_processor
    from rcpo.monitor.model_card import model_card
    from rcpo.monitor.summary import summarize

    step = _step_of(run_folder, folder)
    rows, evaluations = (
        [row for row in run_folder.rows(path) if row["step"] <= step]
        for path in (run_folder.metrics, run_folder.eval)
    )
    summary: dict[str, Any] = summarize(rows, evaluations)
    if folder == run_folder.best:
        summary |= {f"best_{name}": value for name, value in run_folder.read_run()["best"].items()}
    if options.merge:
        lora = dataclasses.replace(config.model.lora, save="merged")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    place, sees = options.push or str(options.out), has_processor(folder)
    return model_card(config, summary, place, for_4=options.transformers4, sees=sees)


def _step_of(run_folder: "RunFolder", folder: Path) -> int:
    """Optimizer steps behind the weights in a model folder of a run."""
    from rcpo.training.checkpoint import step_of

    known = run_folder.read_run()
    if folder == run_folder.best:
        return int(known["best"]["step"])
    if folder == run_folder.final:
        rows = run_folder.rows(run_folder.metrics)
        return int(rows[-1]["step"]) if rows else 0
    return step_of(folder.parent)


def _refuse_unmergeable(run_folder: "RunFolder", config: "ResolvedConfig", folder: Path) -> None:
    """Raise UserError where there is no adapter, or its base is not what it was."""
    from rcpo.reference.cache import weights_fingerprint

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"--merge: {folder} is a whole model already, without an adapter; leave --merge out")
    known = (run_folder.read_run().get("inputs") or {}).get("weights")
    if isinstance(known, str) and weights_fingerprint(config.model) not in (None, known):
        raise UserError(
            f"--merge: the weights at model.path={config.model.path} are others than the adapter was trained "
            "on; put them back, or export it without --merge"
        )


def _model_folder(run_path: str, step: str | None) -> "tuple[RunFolder, ResolvedConfig, Path]":
    """The run, its config, and the model folder in it that is exported, checked."""
    from rcpo.runs.frozen import open_run
    from rcpo.training.checkpoint import check_manifest, checkpoint_path, newest_checkpoint

    folder, config = open_run(run_path)
    if step in NAMED:
        place = folder.best if step == "best" else folder.final
        if not place.is_dir():
            how = "train with train.keep_best=KEY" if step == "best" else "the run is not done; give step=N"
            raise UserError(f"step={step}: there is no {place}; {how}")
        return folder, config, place
    if step is None:
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None and folder.final.is_dir():
            return folder, config, folder.final
    else:
        if not step.isdecimal():
            raise UserError(f"step={step}: must be a whole number")
        checkpoint = checkpoint_path(folder, int(step))
    if checkpoint is None or not (checkpoint / "manifest.json").is_file():
        steps = [
            str(int(path.name.removeprefix("step-"))) for path in sorted(folder.checkpoints.glob("step-*"))
        ]
        raise UserError(
            f"{folder.path}: has no checkpoint{f' of step {step}' if step else ''}; "
            + (
                f"there are step={', '.join(steps)}"
                if steps
                else "train with train.save_every=N to write some"
            )
        )
    check_manifest(checkpoint)
    return folder, config, checkpoint / "model"
