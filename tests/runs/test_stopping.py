"""How long before its end a job begins to stop, and what torchrun would not wait for: by hand."""

import time

import pytest

from rcpo.ranks.stopping import TimeLeft


@pytest.mark.parametrize(
    ("left", "save", "step", "is_up"),
    [
        (1000, 0, 0, False),
        (31, 0, 0, False),
        (29, 0, 0, True),
        (100, 40, 5, False),  # 2 x 5 + 1.5 x 40 + 30 = 100
        (99, 40, 5, True),
        (600, 400, 60, True),  # 8B to a slow disk: 750 s
        (-5, 0, 0, True),
    ],
)
def test_a_stop_begins_when_there_is_just_time_for_it(
    monkeypatch: pytest.MonkeyPatch, left: float, save: float, step: float, is_up: bool
) -> None:
    """Twice the longest step, one and a half times the longest save, and 30 seconds."""
    monkeypatch.setattr(time, "time", lambda: 1_000_000.5 - left)
    env = {"SLURM_JOB_START_TIME": "990000", "SLURM_JOB_END_TIME": "1000000"}
    if left == 100:
        monkeypatch.setattr(time, "time", lambda: 1_000_000 - left)
    assert TimeLeft(env, save, step).is_up() == is_up


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_END_TIME": ""}])
def test_where_no_job_ends_there_is_time(env: dict[str, str]) -> None:
    assert not TimeLeft(env, 1e9, 1e9).is_up()


def test_a_job_too_short_for_what_a_stop_takes_is_used_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of 100 s in a job of 200 s: stopping at once, again and again, would never get anywhere."""
    monkeypatch.setattr(time, "time", lambda: 150.0)
    env = {"SLURM_JOB_START_TIME": "0", "SLURM_JOB_END_TIME": "200"}
    assert not TimeLeft(env, longest_save=100).is_up()
    assert TimeLeft(env, longest_save=20).is_up()


def test_what_torchrun_would_not_wait_for_is_said_once() -> None:
    """A save of 20 s needs 1.5 x 20 = 30 s, which torchrun gives; one of 95 s needs 143 s, with 30 to spare
    173."""
    time_left = TimeLeft({"TORCHELASTIC_RUN_ID": "none"})
    assert time_left.note_save(20) is None
    said = time_left.note_save(95)
    assert said is not None
    assert said.startswith("a checkpoint takes 95 s, and torchrun ends its ranks 30 s after a SIGTERM: ")
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=173" in said
    assert time_left.note_save(99) is None
    patient = TimeLeft({"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"})
    assert patient.note_save(95) is None
    assert TimeLeft({}).note_save(95) is None
