"""W&B: one W&B run per run folder, online, offline or not at all. Built by `rcpo.monitor.sinks` on rank 0
alone.

Owns what is sent and what never is: console output, code, git state, command line, packages, system
statistics and keys stay here. A failing W&B is one warning and never stops training.
"""

import configparser
import contextlib
import logging
import netrc
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from rcpo.monitor.other_trackers import ALERT, SCORES
from rcpo.monitor.wandb_media import log_answers, log_model, log_pairs
from rcpo.runs.answers import Answer
from rcpo.runs.folder import RunFolder
from rcpo.runs.frozen import config_tree

if TYPE_CHECKING:
    from rcpo.config.resolved import ResolvedConfig
    from rcpo.config.schema import TrackingConfig

logger = logging.getLogger(__name__)

WandbMode: TypeAlias = Literal["online", "offline", "disabled"]

INIT_TIMEOUT_SECONDS = 30.0
"""How long W&B may take to answer before the run goes on offline."""
FINISH_TIMEOUT_SECONDS = 300.0
"""How long the end of a run waits for its upload; what is left over is in RUN/wandb/, for `wandb sync`."""
MODEL_TIMEOUT_SECONDS = 3600.0
"""The same where the model goes too."""
CLOUD_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""W&B's own cloud under its older and its newer name (wandb 0.31); a key for either serves both."""
GOING_ON = "going on without it; metrics.jsonl and eval.jsonl have every row"


def wandb_mode(tracking: "TrackingConfig") -> WandbMode:
    """online, offline or disabled. tracking.mode=auto: $WANDB_MODE, else online where a key is configured.

    Online without a key becomes offline with a warning: W&B would ask for a key in the middle of the run.
    """
    asked = _asked(tracking)
    match asked:
        case "offline" | "dryrun":
            return "offline"
        case "disabled":
            return "disabled"
    if has_key():
        return "online"
    if asked in ("online", "run"):
        logger.warning(
            "W&B: mode online, but no API key is configured; tracking offline (`wandb login` sets one)"
        )
    return "offline"


def _asked(tracking: "TrackingConfig") -> str:
    """The mode in W&B's words, or nothing."""
    if tracking.name != "wandb":
        return "disabled"
    return tracking.mode if tracking.mode != "auto" else os.environ.get("WANDB_MODE", "")


def has_key() -> bool:
    """Whether W&B would find credentials without asking: in the environment, or in netrc for its host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(_base_url()).netloc
    hosts = CLOUD_HOSTS if host in CLOUD_HOSTS else (host,)
    candidates = [os.environ.get("NETRC"), Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in filter(None, candidates):
        try:
            entries = netrc.netrc(str(path))
        except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
            continue
        # An entry is (login, account, password); the key is the password.
        if any((entries.authenticators(name) or ("", "", ""))[2] for name in hosts):
            return True
    return False


def _base_url() -> str:
    """W&B's server: $WANDB_BASE_URL, else what `wandb login --host` left in W&B's settings file."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(folder / "settings")
    except (configparser.Error, OSError, UnicodeDecodeError):
        parser.clear()
    written = parser.get("default", "base_url", fallback=f"https://{CLOUD_HOSTS[0]}")
    return os.environ.get("WANDB_BASE_URL") or written


class WandbSink:
    """One W&B run, whose id lives in RUN/run.json: a resumed run continues it. Local files are in RUN/wandb/.

    Rows go as they are, at W&B's own step = `step` (so that none is taken twice after a resume), evaluations
    under `eval/`, scores on tasks under `downstream/`; infinities and nan are sent as such. On closing, the
    summary's values go under `summary/`, and what `rcpo.monitor.wandb_media` makes. Any failure is one
    warning; at the start it goes on offline, later without W&B, on closing without the table or the model
    that failed."""

    def __init__(
        self, config: "ResolvedConfig", run: RunFolder, mode: WandbMode, is_over: bool = False
    ) -> None:
        """`is_over`: the run has ended before, and its last step is taken at W&B."""
        self._folder = run
        # Every start of W&B left a folder: the step that is asked for grows with each.
        self._behind = len(list((run.path / "wandb").glob("*run-*-*"))) if is_over else 0
        self._log_model = config.tracking.log_model
        self._name = config.name
        self._run: Any = None
        self._waiting: list[Callable[[Any], object]] = [self._note_url]
        self._start = threading.Thread(
            target=self._start_run, args=(config, run, mode), name="wandb", daemon=True
        )
        self._start.start()

    def _start_run(self, config: "ResolvedConfig", run: RunFolder, mode: WandbMode) -> None:
        self._run = _start(config, run, mode)

    def _note_url(self, wandb_run: Any) -> None:
        if not wandb_run.offline:
            self._folder.update_run(wandb_url=wandb_run.url)

    def log_step(self, row: dict[str, float]) -> None:
        self._attempt(lambda wandb_run: wandb_run.log(row, step=int(row["step"])))

    def log_eval(self, row: dict[str, float]) -> None:
        named = {key if key == "step" else f"eval/{key}": value for key, value in row.items()}
        self._attempt(lambda wandb_run: wandb_run.log(named, step=int(row["step"])))

    def log_answers(self, answers: Sequence[Answer]) -> None:
        self._attempt(lambda wandb_run: log_answers(wandb_run, self._folder, answers))

    def log_scores(self, step: int, scores: dict[str, float]) -> None:
        named = {f"{SCORES}{task}": value for task, value in scores.items()} | {"step": step}
        self._attempt(lambda wandb_run: wandb_run.log(named, step=max(step + self._behind, wandb_run.step)))

    def alert(self, step: int, line: str) -> None:
        self._attempt(lambda wandb_run: wandb_run.alert(ALERT, f"{self._name}: {line}", level="WARN"))

    def close(self, summary: dict[str, Any], exit_code: int) -> None:
        self._start.join()
        values = {f"summary/{key}": value for key, value in summary.items() if value is not None}
        self._attempt(lambda wandb_run: wandb_run.summary.update(values))
        if summary:
            self._send(log_pairs, summary, "the table of held-out pairs is not sent; RUN/eval/ has it")
        if summary and self._log_model:
            self._send(log_model, summary, "the model is not sent; it is in RUN/final/")
        self._attempt(lambda wandb_run: wandb_run.finish(exit_code=exit_code))
        self._run = None

    def _send(
        self,
        send: Callable[[Any, RunFolder, dict[str, Any]], None],
        summary: dict[str, Any],
        consequence: str,
    ) -> None:
        """One of `rcpo.monitor.wandb_media`'s; where it fails the W&B run goes on to its end."""
        if self._run is None:
            return
        try:
            send(self._run, self._folder, summary)
        except Exception as error:
            _warn(error, consequence)

    def _attempt(self, call: Callable[[Any], object]) -> None:
        """Call with the W&B run, once it has started; after a failure, which is said once, there is none."""
        self._waiting.append(call)
        if self._start.is_alive():
            return
        calls, self._waiting = self._waiting, []
        try:
            for each in calls:
                if self._run is not None:
                    each(self._run)
        except Exception as error:
            self._run = None
            _warn(error, GOING_ON)


def _start(config: "ResolvedConfig", run: RunFolder, mode: WandbMode) -> Any:
    """The W&B run; an offline one where online fails; None where that fails too."""
    try:
        return _start_wandb(config, run, mode)
    except Exception as error:
        if mode == "offline":
            _warn(error, GOING_ON)
            return None
        _warn(error, "tracking offline")
        with contextlib.suppress(Exception):
            _release_run_id()
        return _start(config, run, "offline")


def _release_run_id() -> None:
    """After a failed start W&B's service still holds the run's id; ending the service frees it."""
    import wandb

    wandb.teardown()


def _warn(error: Exception, consequence: str) -> None:
    first = (str(error).strip().splitlines() or [""])[0]
    logger.warning("W&B failed (%s: %s); %s", type(error).__name__, first, consequence)


def _start_wandb(config: "ResolvedConfig", run: RunFolder, mode: WandbMode) -> Any:
    import wandb  # slow to import, and not needed with tracking=none

    settings = wandb.Settings(
        silent=True,
        console="off",
        symlink=False,
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=MODEL_TIMEOUT_SECONDS if config.tracking.log_model else FINISH_TIMEOUT_SECONDS,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    tracking = config.tracking
    started = wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        tags=tracking.tags,
        name=config.name,
        id=run.read_run()["wandb_id"],
        resume="allow",
        mode=mode,
        dir=str(run.path),
        config=config_tree(config),
        settings=settings,
    )
    started.define_metric("*", step_metric="step")
    return started
