"""`rcpo evaluate SWEEP --slurm` on a real SLURM: a cell is evaluated when its training has ended well, and
never where that fails."""

import contextlib
import json
from pathlib import Path

import pytest

from helpers.slurm_cluster import Cluster
from helpers.slurm_stage import Stage, said
from rcpo.cli import dispatch
from rcpo.evaluation.results import INITIAL, Results
from rcpo.sweep.slurm.evaluation import jobs_that_live, read_evaluated

pytestmark = pytest.mark.ci("SLURM", needs="slurm")

PROFILE = {"time": "00:10:00", "processes": "1", "mem": "1000M"}


def test_cells_are_evaluated_when_they_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cells one has no data any more when it starts. What the other one started from is asked too."""
    cluster = Cluster(tmp_path / "cluster", num_nodes=2, spare=0, max_array_size=3)
    stage = Stage(cluster, tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("RCPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = tmp_path / "pairs.jsonl"
    row = {"prompt": "what is one ?", "chosen": "it is one .", "rejected": "it is two ."}
    data.write_text("".join(json.dumps(row | {"prompt": f"what is {idx} ?"}) + "\n" for idx in range(24)))
    gone = {"label": "gone", "overrides": ["data=file", f"data.path={data}"]}
    profile = str(tmp_path / "pair-profile.yaml")
    with contextlib.ExitStack() as stack:
        stack.callback(cluster.stop)
        cluster.start()
        sweep = stage.freeze(
            "pair", PROFILE, axes={"data": ["arithmetic", gone]}, overrides=["train.steps=5"]
        )
        data.unlink()
        cluster.run(
            "scontrol", "update", "PartitionName=main", "State=DOWN"
        )  # nothing starts until all waits
        sweep.submit()
        words = ["evaluate", str(sweep.folder.path), "--slurm", profile]
        with said() as text:
            assert dispatch(words) == 0
        assert "submitted the evaluation of 2 cells as job" in text.getvalue()
        assert ", each after its training in job" in text.getvalue()
        with said() as text:
            assert dispatch(words) == 0
        assert "left alone: 2 queued or running" in text.getvalue()
        cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
        sweep.wait(lambda: not jobs_that_live(sweep.folder), "no evaluation is left", may_fail=True)
        found = {each.cell: each for each in read_evaluated(sweep.folder)}
        with said() as text:
            assert dispatch(["status", str(sweep.folder.path)]) == 0
        assert "evaluation of 2 cells: 1 done, 1 not started" in text.getvalue()
    assert {name: each.state for name, each in found.items()} == {"arithmetic": "done", "gone": "not started"}
    results = Results(sweep.run("arithmetic").path)
    assert set(results.of("final")) == set(results.of(INITIAL)) == {"arithmetic"}
    assert not (sweep.run("gone").path / "evaluation.json").exists()
