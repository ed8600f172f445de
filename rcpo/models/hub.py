"""A model or an adapter of the Hugging Face hub as a folder on this machine.

Of one commit: the first process of a run that reads it asks the hub, and the run keeps the commit
(`model.revision`), so that its ranks, its resumed runs and the nodes of a cluster read the same files. A
commit that is here is read without the network; one that is not is fetched once a node, since the hub's
client holds a lock. Called by `rcpo.models.load`, by `rcpo.launch.first_look` before torch is loaded, and by
`rcpo.models.commits`."""

import functools
import json
import os
from pathlib import Path

from rcpo.common.hub import SECONDS, HubName, commit_now, one_line_faults
from rcpo.config.names import BUILTIN

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Config, tokenizer, chat template, and code that only `model.trust_remote_code` runs."""
WEIGHTS = ("model*.safetensors",)
PICKLED = ("pytorch_model*.bin",)


def hub_folder(path: str, revision: str | None, needs_weights: bool, allow_pickle: bool) -> Path:
    """The files at the top of repository `path` at `revision` (a branch, tag or commit; None: main).

    Without `needs_weights` config and tokenizer alone are fetched. Raises UserError where they are neither
    here nor to be had: no such repository or revision, no right to read it, no network."""
    weights = (*WEIGHTS, *(PICKLED if allow_pickle else ())) if needs_weights else ()
    return _fetched(HubName(path, revision), CONFIG, weights, (*FILES, *weights))


def adapter_hub_folder(path: str, revision: str | None, config: str, weights: str) -> Path:
    """Likewise the two files of the adapter that repository `path` holds."""
    return _fetched(_adapter_name(path, revision), config, (weights,), (config, weights))


def _adapter_name(path: str, revision: str | None) -> HubName:
    return HubName(path, revision, "adapter", "model.lora.adapter", "model.lora.adapter_revision")


def _fetched(name: HubName, config: str, weights: tuple[str, ...], files: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    commit = _commit_of(name, config)
    if (here := _here(name.path, commit, weights, config)) is not None:
        return here
    with one_line_faults(name):
        HfApi().list_repo_files(name.path, revision=commit)  # else a part would be taken without a network
        return Path(
            snapshot_download(name.path, revision=commit, allow_patterns=list(files), ignore_patterns=["*/*"])
        )


def commit_of(path: str, revision: str | None) -> str:
    """The commit that `revision` is now, asked for once a process; where the hub cannot be reached, the one
    that is here, with a word. Raises UserError where there is none."""
    return _commit_of(HubName(path, revision), CONFIG)


def commit_of_adapter(path: str, revision: str | None) -> str:
    """Likewise of an adapter's repository."""
    return _commit_of(_adapter_name(path, revision), ADAPTER_CONFIG)


@functools.cache
def _commit_of(name: HubName, config: str) -> str:
    if name.is_commit:
        return str(name.revision)
    from huggingface_hub import HfApi

    def here() -> str | None:
        folder = _here(name.path, name.revision, (), config)
        return None if folder is None else folder.name

    return commit_now(
        name, lambda: HfApi().model_info(name.path, revision=name.revision, timeout=SECONDS), here
    )


def is_hub_id(path: str) -> bool:
    """Whether it is neither a folder nor builtin:NAME; that it may be one, `rcpo.models.places` says."""
    return path not in BUILTIN and not os.path.isdir(path)


def is_commit_here(path: str, commit: str | None) -> bool:
    """Whether repository `path` at this commit is on this machine; asks nobody."""
    return HubName(path, commit).is_commit and is_hub_id(path) and _here(path, commit, (), CONFIG) is not None


def _here(path: str, revision: str | None, weights: tuple[str, ...], config: str) -> Path | None:
    """The snapshot where it is on this machine, with all its weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    is_whole = (folder / config).is_file() and (not weights or _has_weights(folder, weights))
    return folder if is_whole else None


def _has_weights(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether every file is there that an index names, or one where there is no index."""
    for index in folder.glob("*.index.json"):
        named = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
        if named and all((folder / name).is_file() for name in named):
            return True
    is_indexed = any(folder.glob("model*.index.json"))
    return not is_indexed and any(True for pattern in patterns for _ in folder.glob(pattern))
