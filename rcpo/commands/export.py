"""`rcpo export RUN OUT [step=N]`: a Hugging Face model folder from a checkpoint, at any ZeRO stage.

Every checkpoint holds its whole weights as safetensors, so this is a checked copy: no engine, no pickle.
"""

import shutil
from pathlib import Path

from rcpo.common.errors import UserError
from rcpo.common.files import replacing

HELP = """usage: rcpo export RUN OUT [step=N]

Write the model of RUN's newest checkpoint (or of step N) to the new folder OUT, as safetensors with tokenizer
and config: transformers loads it with AutoModelForCausalLM.from_pretrained(OUT). A run that is done has its
final model in RUN/final already; without a checkpoint, that is what is exported."""


def run(words: list[str]) -> int:
    """Export; returns the exit code. Raises UserError when there is nothing to export or OUT exists."""
    if words[:1] in (["-h"], ["--help"]):
        print(HELP)
        return 0
    if len(words) not in (2, 3) or (len(words) == 3 and not words[2].startswith("step=")):
        raise UserError("export takes a run folder and a new folder; type rcpo export RUN OUT [step=N]")
    out = Path(words[1])
    if out.exists():
        raise UserError(f"{out}: exists; export writes a new folder only, give another name")
    source = _source(words[0], words[2].removeprefix("step=") if len(words) == 3 else None)
    try:
        with replacing(out) as beside:
            shutil.copytree(source, beside)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    print(f"wrote {out} from {source}")
    return 0


def _source(run_path: str, step: str | None) -> Path:
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
