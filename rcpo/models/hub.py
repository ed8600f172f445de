"""A model of the Hugging Face hub as a folder on this machine.

Of one commit: the first process of a run that reads it asks the hub, and the run keeps the commit
(`model.revision`), so that its ranks, its resumed runs and the nodes of a cluster read the same files. A
commit that is here is read without the network; one that is not is fetched once a node, since the hub's
client holds a lock. Called by `rcpo.models.load` and `rcpo.launch.start`."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rcpo.common.errors import UserError
from rcpo.config.names import TINY
from rcpo.config.resolved import ResolvedConfig

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Config, tokenizer, chat template, and code that only `model.trust_remote_code` runs."""
WEIGHTS = ("model*.safetensors",)
PICKLED = ("pytorch_model*.bin",)
SECONDS = 10.0
"""Longest that the hub may take to say which commit it has."""


def hub_folder(path: str, revision: str | None, needs_weights: bool, allow_pickle: bool) -> Path:
    """The files at the top of repository `path` at `revision` (a branch, tag or commit; None: main).

    Without `needs_weights` config and tokenizer alone are fetched. Raises UserError where they are neither
    here nor to be had: no such repository or revision, no right to read it, no network."""
    from huggingface_hub import HfApi, snapshot_download

    commit = commit_of(path, revision)
    weights = (*WEIGHTS, *(PICKLED if allow_pickle else ())) if needs_weights else ()
    if (here := _here(path, commit, weights)) is not None:
        return here
    with _one_line_faults(path, revision):
        HfApi().list_repo_files(path, revision=commit)  # without a network a part that is here would be taken
        files = [*FILES, *weights]
        return Path(snapshot_download(path, revision=commit, allow_patterns=files, ignore_patterns=["*/*"]))


@functools.cache
def commit_of(path: str, revision: str | None) -> str:
    """The commit that `revision` is now, asked for once a process; where the hub cannot be reached, the one
    that is here, with a word. Raises UserError where there is none."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants

    with _one_line_faults(path, revision):
        try:
            return str(HfApi().model_info(path, revision=revision, timeout=SECONDS).sha)
        # No network: each client library raises a class of its own.
        except Exception as error:
            here = None if _is_answer(error) else _here(path, revision, ())
            if here is None:
                raise
    level = logging.INFO if constants.HF_HUB_OFFLINE else logging.WARNING
    logger.log(level, "%s: the hub cannot be reached; commit %s is here, and is taken", path, here.name)
    return here.name


def _is_answer(error: Exception) -> bool:
    """Whether it is the hub that says no."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError)


@contextlib.contextmanager
def _one_line_faults(path: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the hub's client raises into a UserError with the words to type."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        fault = "access to it must be asked for on its page of the hub; then type hf auth login"
    except RevisionNotFoundError:
        raise UserError(
            f"model.revision={revision}: {path} has no such branch, tag or commit; give one that it has"
        ) from None
    except RepositoryNotFoundError:
        fault = (
            "the hub has no such model, or it is private; give a model folder or another id, or type "
            "hf auth login"
        )
    except Exception as error:
        raise UserError(f"model.path={path}: {_unreachable(path, revision, error)}") from error
    else:
        return
    raise UserError(f"model.path={path}: {fault}")


def at_commit(config: ResolvedConfig) -> ResolvedConfig:
    """The config with the commits of the hub models that the run reads: what it keeps."""
    model, reference = config.model, config.reference
    if is_hub_id(model.path):
        model = dataclasses.replace(model, revision=commit_of(model.path, model.revision))
    is_read = reference.path is not None and config.objective_function.needs_reference
    if is_read and is_hub_id(str(reference.path)):
        commit = commit_of(str(reference.path), reference.revision)
        reference = dataclasses.replace(reference, revision=commit)
    return dataclasses.replace(config, model=model, reference=reference)


def is_hub_id(path: str) -> bool:
    """Whether it is none of a folder and builtin:tiny; that it may be one, `rcpo.models.places` says."""
    return path != TINY and not os.path.isdir(path)


def is_commit_here(path: str, commit: str | None) -> bool:
    """Whether repository `path` at this commit is on this machine; asks nobody."""
    is_commit = commit is not None and COMMIT.fullmatch(commit) is not None
    return is_commit and is_hub_id(path) and _here(path, commit, ()) is not None


def _unreachable(path: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import constants

    command = f"hf download {path}" + (f" --revision {revision}" if revision is not None else "")
    reason = " ".join(str(error).split())[:100] or type(error).__name__
    return (
        f"is not on this machine, and the hub cannot be reached ({reason}); type `{command}` where there is "
        f"a network and bring HF_HOME here (it is {constants.HF_HOME}), or give a model folder"
    )


def _here(path: str, revision: str | None, weights: tuple[str, ...]) -> Path | None:
    """The snapshot where it is on this machine, with all its weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    is_whole = (folder / "config.json").is_file() and (not weights or _has_weights(folder, weights))
    return folder if is_whole else None


def _has_weights(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether every file is there that an index names, or one where there is no index."""
    for index in folder.glob("*.index.json"):
        named = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
        if named and all((folder / name).is_file() for name in named):
            return True
    is_indexed = any(folder.glob("model*.index.json"))
    return not is_indexed and any(True for pattern in patterns for _ in folder.glob(pattern))
