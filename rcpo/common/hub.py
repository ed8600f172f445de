"""What a name on the Hugging Face hub is now, and every fault of the hub as one line.

A run keeps the commits of all that it reads there. Which of a commit's files are on this machine, and how the
others are fetched, is for those who read them: `rcpo.models.hub`, `rcpo.records.hub`."""

import contextlib
import logging
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rcpo.common.errors import UserError

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 10.0
"""Longest that the hub may take to say which commit it has."""


class HubName(NamedTuple):
    """A repository at a branch, tag or commit (None: main), and the config keys that say so, for errors."""

    path: str
    revision: str | None
    kind: str = "model"
    key: str = "model.path"
    revision_key: str = "model.revision"

    @property
    def is_commit(self) -> bool:
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def commit_now(name: HubName, ask: Callable[[], object], here: Callable[[], str | None]) -> str:
    """The commit that the hub's answer to `ask` has; where the hub cannot be reached, the one that is `here`,
    with a word. Raises UserError where there is none."""
    from huggingface_hub import constants

    with one_line_faults(name):
        try:
            return str(getattr(ask(), "sha", ""))
        # No network: each client library raises a class of its own.
        except Exception as error:
            found = None if _is_answer(error) else here()
            if found is None:
                raise
    level = logging.INFO if constants.HF_HUB_OFFLINE else logging.WARNING
    logger.log(level, "%s: the hub cannot be reached; commit %s is here, and is taken", name.path, found)
    return found


def _is_answer(error: Exception) -> bool:
    """Whether it is the hub that says no."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError)


@contextlib.contextmanager
def one_line_faults(name: HubName) -> Iterator[None]:
    """Turn whatever the hub's client raises into a UserError with the words to type."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        fault = "access to it must be asked for on its page of the hub; then type hf auth login"
    except RevisionNotFoundError:
        raise UserError(
            f"{name.revision_key}={name.revision}: {name.path} has no such branch, tag or commit; give one "
            "that it has"
        ) from None
    except RepositoryNotFoundError:
        fault = (
            f"the hub has no such {name.kind}, or it is private; give a {name.kind} folder or another id, or "
            "type hf auth login"
        )
    except Exception as error:
        raise UserError(f"{name.key}={name.path}: {unreachable(name, error)}") from error
    else:
        return
    raise UserError(f"{name.key}={name.path}: {fault}")


def unreachable(name: HubName, error: Exception | str) -> str:
    """What to do about it."""
    from huggingface_hub import constants

    is_data = name.kind == "data set"  # whose files the client's own cache does not hold
    command = "hf download " + ("--repo-type dataset " if is_data else "") + name.path
    command += f" --revision {name.revision}" if name.revision is not None else ""
    command += " --local-dir FOLDER" if is_data else ""
    reason = textwrap.shorten(str(error), 100, placeholder=" ...") or type(error).__name__
    home = f"bring HF_HOME here (it is {constants.HF_HOME}), or give a {name.kind} folder"
    return (
        f"is not on this machine, and the hub cannot be reached ({reason}); type `{command}` where there is "
        "a network and " + (f"bring FOLDER here; then {name.key}=FOLDER" if is_data else home)
    )
