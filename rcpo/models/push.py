"""A model folder to the Hugging Face hub, through huggingface_hub: `rcpo export --push`.

Asks nothing. The token comes from $HF_TOKEN alone, the hub's address from $HF_ENDPOINT where it is set.
"""

import os
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

from rcpo.common.errors import UserError


def refuse_unpushable(repository: str, is_public: bool) -> None:
    """Raise UserError where `repository` is no ORG/NAME, or there is no token."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", repository) is None:
        raise UserError(f"--push {repository}: is no repository of the hub; type --push ORG/NAME")
    if not os.environ.get("HF_TOKEN"):
        public = " --public" if is_public else ""
        raise UserError(
            f"--push {repository}: there is no token in the environment; type export HF_TOKEN=... (one that "
            f"may write, of your settings on the hub) before rcpo export ... --push {repository}{public}"
        )


def push_folder(folder: Path, repository: str, is_public: bool, message: str) -> str:
    """Make the repository where there is none, private but with `is_public`, and commit the folder's files to
    it; returns the commit's page. Raises UserError for every fault of the hub."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=os.environ.get("HF_TOKEN"))
    try:
        api.create_repo(repository, private=not is_public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    # Each layer of the client raises classes of its own.
    except Exception as error:
        private = "" if is_public else " --private"  # a repository that hf upload makes is public without
        raise UserError(
            f"--push {repository}: {_said(error)}; {folder} is written: mend that and type hf upload "
            f"{repository} {folder}{private}"
        ) from None
    return str(commit.commit_url)


def _said(error: Exception) -> str:
    """What the hub said, without the address that its client adds to a refused token."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == HTTPStatus.UNAUTHORIZED:
        return "the hub does not take the token in HF_TOKEN (401 Unauthorized)"
    if status == HTTPStatus.FORBIDDEN:
        return "the token in HF_TOKEN may not write there (403 Forbidden)"
    return f"the hub did not take it ({' '.join(str(error).split())[:300] or type(error).__name__})"


def listed(files: Mapping[str, int]) -> Iterator[str]:
    """Names and sizes in bytes as lines, with their sum."""
    width = max((len(name) for name in files), default=0)
    for name, size in sorted(files.items()):
        yield f"  {name:<{width}}  {size:>15,}"
    yield f"  {len(files)} files, {sum(files.values()):,} bytes"


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of every file of a folder, by its path in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
