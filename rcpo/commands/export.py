"""`rcpo export RUN OUT [step=N] [--transformers4]`: a Hugging Face model folder from a checkpoint, at any
ZeRO stage.

Every checkpoint holds its whole weights as safetensors, so this is a checked copy: no engine, no pickle.
"""

import argparse
import shutil
from pathlib import Path

from rcpo.commands.flags import Flags
from rcpo.common.errors import UserError
from rcpo.common.files import replacing


def add_arguments(parser: Flags) -> None:
    parser.description = """\
Write the model of a run's newest checkpoint, or of one step, as a Hugging Face model folder:
safetensors with tokenizer and config, which transformers loads with
AutoModelForCausalLM.from_pretrained(OUT). A run that is done has its final model in RUN/final
already; without a checkpoint, that is what is exported. These folders are for transformers 5."""
    parser.epilog = """\
examples:
  rcpo export runs/dpo-on-1 my-model
  rcpo export runs/dpo-on-1 my-model step=200
  rcpo export runs/dpo-on-1 my-model --transformers4"""
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="the new folder")
    parser.add_argument("step", metavar="step=N", nargs="?", help="the checkpoint of that step")
    parser.add_argument(
        "--transformers4",
        action="store_true",
        help="write config and tokenizer as transformers 4 reads them; of some architectures only",
    )


def run(options: argparse.Namespace) -> int:
    """Export; returns the exit code. Raises UserError when there is nothing to export or OUT exists."""
    from rcpo.models.transformers4 import for_transformers4, has_capped_attention

    out, step = options.out, options.step
    if step is not None and not step.startswith("step="):
        raise UserError(f"{step}: must be the step of a checkpoint; type step=N")
    if out.exists():
        raise UserError(f"{out}: exists; export writes a new folder only, give another name")
    folder = _model_folder(options.run, None if step is None else step.removeprefix("step="))
    try:
        with replacing(out) as beside:
            shutil.copytree(folder, beside)
            if options.transformers4:
                for_transformers4(beside)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    print(f"wrote {out} from {folder}")
    if options.transformers4 and has_capped_attention(out):
        print("transformers 4 caps this model's attention with attn_implementation='eager' alone")
    return 0


def _model_folder(run_path: str, step: str | None) -> Path:
    from rcpo.runs.frozen import open_run
    from rcpo.training.checkpoint import check_manifest, checkpoint_path, newest_checkpoint

    folder, _ = open_run(run_path)
    if step is None:
        checkpoint = newest_checkpoint(folder)
        if checkpoint is None and folder.final.is_dir():
            return folder.final
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
    return checkpoint / "model"
