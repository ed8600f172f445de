"""Data sets of the Hugging Face hub, each of one commit, which the run keeps (`data.revision`).

`datasets` takes the newest commit that is on this machine where the hub cannot be reached, whatever was asked
for; here a commit is what was asked for, or a UserError. Called by `rcpo.records.readers`, and by
`rcpo.models.hub` for what a run keeps."""

import functools
from pathlib import Path
from typing import Any

from rcpo.common.errors import UserError
from rcpo.common.hub import COMMIT, SECONDS, HubName, commit_now, unreachable
from rcpo.config.evaluation import EvaluationConfig
from rcpo.config.schema import DataConfig
from rcpo.records.places import is_hub_id

REVISION, QUESTIONS_REVISION = "data.revision", "questions_revision"


def hub_name(path: str, revision: str | None, key: str, revision_key: str = REVISION) -> HubName:
    return HubName(path, revision, "data set", key, revision_key)


@functools.cache
def commit_of_data(name: HubName) -> str:
    """The commit that the data set's revision is now, asked for once a process."""
    if name.is_commit:
        return str(name.revision)
    from huggingface_hub import HfApi

    return commit_now(
        name,
        lambda: HfApi().dataset_info(name.path, revision=name.revision, timeout=SECONDS),
        lambda: _newest_here(name),
    )


def _newest_here(name: HubName) -> str | None:
    """Of no revision the newest commit that `datasets` has read here; what another one is, is not known."""
    folders = [] if name.revision is not None else _folders_here(name.path, "*")
    return max(folders, key=lambda folder: folder.stat().st_mtime).name if folders else None


def _folders_here(path: str, commit: str) -> list[Path]:
    """Where `datasets` keeps what it has read: NAMESPACE___NAME/CONFIG/VERSION/COMMIT."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    namespace, _, own = path.rpartition("/")
    kept = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    folder = kept / "___".join([*filter(None, [namespace]), camelcase_to_snakecase(own)])
    return [each for each in folder.glob(f"*/*/{commit}") if each.is_dir() and COMMIT.fullmatch(each.name)]


def load_at_commit(name: HubName, config: str | None) -> Any:
    """All splits of the data set at its commit: from this machine where it is here, else from the hub.

    Raises what `datasets` raises, and UserError where that has given another commit."""
    import datasets

    commit = commit_of_data(name)
    here = [each for each in _folders_here(name.path, commit) if config in (None, each.parts[-3])]
    if len(here) == 1 and (config is not None or _has_one_config(name.path, commit)):
        from datasets.packaged_modules.cache.cache import Cache

        of_config, version = here[0].parts[-3:-1]
        own = name.path.rpartition("/")[2]
        builder = Cache(
            dataset_name=own, config_name=of_config, version=version, hash=commit, repo_id=name.path
        )
        return builder.as_dataset()
    loaded = datasets.load_dataset(name.path, config, revision=commit)
    if (found := _commit_loaded(loaded)) not in (None, commit):
        fault = unreachable(name._replace(revision=commit), f"commit {found} is here alone")
        raise UserError(f"{name.key}={name.path}: {fault}")
    return loaded


def _has_one_config(path: str, commit: str) -> bool:
    """Whether no other config of the commit has been read here: which is the default one, is not known."""
    return len(_folders_here(path, commit)) == 1


def _commit_loaded(loaded: Any) -> str | None:
    """By the folder that its files lie in; None where it has none."""
    splits = loaded.values() if isinstance(loaded, dict) else [loaded]
    for split in splits:
        for file in split.cache_files:
            folder = Path(file["filename"]).parent.name
            if COMMIT.fullmatch(folder):
                return folder
    return None


def revisions_at_commits(config: DataConfig) -> dict[str, str] | str | None:
    """data.revision with the commit of every hub data set that is read; as it is where there is none."""
    if config.source != "file":
        return config.revision
    keys = dict.fromkeys(config.eval_paths(), "data.eval_path")
    keys |= dict.fromkeys(config.train_paths(), "data.path")
    found = {
        path: commit_of_data(hub_name(path, config.revision_of(path), key))
        for path, key in keys.items()
        if is_hub_id(path)
    }
    return found or config.revision


def commit_of_questions(config: EvaluationConfig) -> str | None:
    """The commit of evaluation.questions where they are a data set of the hub."""
    path, revision = config.questions, config.questions_revision
    if path is None or not is_hub_id(path):
        return None
    return commit_of_data(hub_name(path, revision, "questions", QUESTIONS_REVISION))
