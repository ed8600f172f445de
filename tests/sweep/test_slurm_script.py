"""Profiles and the batch script without a SLURM: every fault is one line, every script is shell that means
what the profile says. `tests/ci/test_slurm.py` runs scripts for real."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rcpo.common.errors import UserError
from rcpo.config.compose import compose
from rcpo.config.validate import validate
from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.slurm.profile import (
    Profile,
    SlurmTarget,
    check_profile,
    profile_names,
    read_profile,
    seconds_of_time,
)
from rcpo.sweep.slurm.queue import clean_environment
from rcpo.sweep.slurm.script import Chunk, Script, chunks_of, template_path


def script_of(profile: Profile, path: Path, num_cells: int = 4, **changes: Any) -> str:
    given = {"max_parallel": None, "max_array_size": 1001, "folder": Path("/here")} | changes
    return Script(SweepFolder(path), "0123456789ab", profile, num_cells, **given).text()


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def assert_is_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_makes_a_script(name: str, tmp_path: Path) -> None:
    script = script_of(read_profile(name), tmp_path)
    assert_is_shell(script)
    assert not re.findall(r"@[A-Z_]+@", script)
    assert len(script.splitlines()) < 130


def test_the_example_has_every_key() -> None:
    """Explained line by line, and valid."""
    text = (template_path().parents[1] / "conf/cluster/example.yaml").read_text()
    keys = re.findall(r"^([a-z_]+):", text, flags=re.MULTILINE)
    assert set(keys) == set(Profile.__dataclass_fields__)


def test_a_profile_of_gpus_asks_for_them_and_gives_each_a_rank(tmp_path: Path) -> None:
    profile = check_profile(
        {"nodes": "2", "gpus_per_node": "4", "gpu_type": "a100", "time": "1-00:00:00", "partition": "gpu",
         "account": "me", "modules": ["cuda/12.8", "gcc"], "setup": ["export A='b c'"],
         "srun": ["--mpi=none"], "container": "apptainer exec --nv '/img/a b.sif'", "sbatch": ["--exclusive"],
         "requeue_limit": "7", "signal_seconds": "300"}
    )  # fmt: skip
    script = script_of(profile, tmp_path, max_parallel=2)
    assert_is_shell(script)
    assert set(options_of(script)) >= {
        "--exclusive", "--array=0-3%2", "--partition=gpu", "--account=me", "--time=1-00:00:00", "--nodes=2",
        "--ntasks-per-node=4", "--gres=gpu:a100:4", "--cpus-per-task=1", "--requeue", "--signal=B:USR2@300",
    }  # fmt: skip
    assert "\nfi\nmodule load cuda/12.8 gcc\nexport A='b c'\n" in script
    srun = "srun --kill-on-bad-exit=1 --wait=0 --mpi=none apptainer exec --nv '/img/a b.sif'"
    assert f'    {srun} "$python" -m rcpo.cli resume "$cell" </dev/null &' in script
    assert "\npython=python\n" in script
    assert "\nrequeue_limit=7 " in script
    assert "CUDA_VISIBLE_DEVICES" not in script
    assert SlurmTarget(profile).words == ("train.device=cuda", "launch.nodes=2", "launch.gpus_per_node=4")


def test_cells_are_resolved_for_the_cluster_and_not_for_this_machine() -> None:
    """8 GPUs that are not here: bfloat16, 16 pairs over 8 ranks."""
    target = SlurmTarget(check_profile({"nodes": "2", "gpus_per_node": "4"}))
    tree = compose(["tracking=none", *target.words])
    assert tree is not None
    config = target.resolve(validate(tree))
    assert (config.train.device, config.model.dtype, config.world_size()) == ("cuda", "bfloat16", 8)
    assert config.train.pairs_per_device == 2


def test_the_example_asks_for_what_it_needs_and_for_few_cells_at_a_time(tmp_path: Path) -> None:
    """No node for itself alone; sixteen cells of ninety at a time, unless it is told otherwise."""
    profile = read_profile("example")
    options = options_of(script_of(profile, tmp_path, 90, max_parallel=profile.throttle(None)))
    assert "--array=0-89%16" in options
    assert not any("exclusive" in option for option in options)
    assert (profile.throttle(4), check_profile({"max_parallel": "0"}).throttle(None)) == (4, None)
    assert Profile().throttle(None) == profile.throttle(None)


@pytest.mark.parametrize("place", ["MODULESHOME", "LMOD_PKG", None])
def test_module_load_works_in_a_shell_that_is_no_login_shell(tmp_path: Path, place: str | None) -> None:
    """The site's functions are sourced, whatever their file returns; where there are none a line says so."""
    script = script_of(check_profile({"modules": ["gcc"]}), tmp_path)
    start = script.index("set -e\ncd ") + len("set -e\n")
    setup = script[script.index("# `module` is", start) : script.index("\nset +e\ntrap - EXIT")]
    (tmp_path / "init").mkdir()
    (tmp_path / "init/bash").write_text('PATH=/site\nmodule() { echo "$@"; }\nfalse\n')
    here = {"PATH": "/usr/bin:/bin"} | ({} if place is None else {place: str(tmp_path)})
    done = subprocess.run(
        ["bash", "--norc", "-c", f"set -e\n{setup}\necho $PATH"], env=here, capture_output=True, text=True
    )
    if place is None and done.returncode:  # a machine without modules
        assert done.stdout == "module: no such command on this node; load what is needed in setup:\n"
    elif place is not None:
        assert (done.returncode, done.stdout) == (0, "load gcc\n/usr/bin:/bin:/site\n"), done.stderr


FAULTS = {
    "max_parallel: -1": "max_parallel: '-1': must be greater than or equal to 0",
    "partitoin: gpu": "partitoin: no such key; conf/cluster/example.yaml has them all",
    "partitoin: null": "partitoin: no such key; conf/cluster/example.yaml has them all",
    "partition: 'a b'": "partition: 'a b': must match",
    "partition: 'x; rm -rf /'": "partition: 'x; rm -rf /': must match",
    "account: [a, b]": "account: ['a', 'b']: must be a valid string",
    "nodes: two": "nodes: 'two': must be a valid integer",
    "nodes: 0": "nodes: '0': must be greater than 0",
    "time: tomorrow": "time: 'tomorrow': must be MINUTES, HH:MM:SS or DAYS-HH:MM:SS",
    "mem: lots": "mem: 'lots': must match",
    "gpu_request: please": "gpu_request: 'please': must be 'gres', 'gpus-per-node' or 'none'",
    "setup: module load cuda": "setup: 'module load cuda': must be a valid list",
    'setup: ["a\\nb"]': "setup.0: 'a\\nb': must match",
    "sbatch: [exclusive]": "sbatch.0: 'exclusive': must match",
    "{gpus_per_node: 1, processes: 1}": "gpus_per_node: 1 and processes: 1: give one of the two",
    "{gpu_type: a100}": "gpu_type: a100: needs gpus_per_node",
    "{time: 00:05:00, signal_seconds: 300}": "signal_seconds: 300: must be less than time: 00:05:00, which",
    '{container: "run \'img"}': 'container: "run \'img": No closing quotation',
    "- a": "must hold keys and values, as conf/cluster/example.yaml does",
    "a: [": "is not YAML",
}
"""What a profile holds, and how the line about it begins."""


@pytest.mark.parametrize("text", FAULTS)
def test_a_wrong_profile_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_profile(str(path))
    assert str(caught.value).startswith(f"--slurm {path}: {FAULTS[text]}")
    assert "\n" not in str(caught.value)


def test_a_profile_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--slurm nowhere: no such profile; choose one of cpu, example, or"):
        read_profile("nowhere")
    with pytest.raises(UserError, match=r"--slurm .*/none.yaml: No such file or directory"):
        read_profile(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("12:00:00", 43200), ("2-0", 172800), ("1-02:03", 93780)],
)
def test_time_is_read_as_sbatch_reads_it(text: str, seconds: int) -> None:
    assert seconds_of_time(text) == seconds


def test_arrays_are_cut_where_the_cluster_wants_it(tmp_path: Path) -> None:
    """2500 cells in arrays of at most 1001; of a few cells, only the arrays that hold them."""
    assert [(chunk.first, chunk.array(None)) for chunk in chunks_of(range(2500), 1001)] == [
        (0, "0-1000"), (1001, "0-1000"), (2002, "0-497"),
    ]  # fmt: skip
    assert chunks_of([1500, 3, 4, 7], 1001) == [Chunk(0, [3, 4, 7]), Chunk(1001, [1500])]
    assert [chunk.array(4) for chunk in chunks_of([1500, 3, 4, 7], 1001)] == ["3-4,7%4", "499%4"]
    script = script_of(Profile(), tmp_path, num_cells=2500)
    assert "--array=0-1000" in options_of(script)
    by_hand = re.findall(r"^#     (sbatch .*)$", script, flags=re.MULTILINE)
    assert [line.split()[-1] for line in by_hand] == ["0", "1001", "2002"]


def test_hostile_names_stay_one_word(tmp_path: Path) -> None:
    """As a folder's name: quotes, substitutions, a line that would be an option of sbatch."""
    name = "it's $(touch PWNED) `id` %j #SBATCH --account=other"
    script = script_of(Profile(), tmp_path / name, folder=tmp_path / name)
    assert_is_shell(script)
    assert "--account=other" not in options_of(script)
    assert [line for line in options_of(script) if "job-name" in line] == [
        "--job-name=rcpo-it_s_touch_PWNED_id_j_SBATCH_--account_other"
    ]
    assigned = script[script.index("\nsweep=") :].splitlines()[1]
    done = subprocess.run(
        ["bash", "-c", f'{assigned}; printf %s "$sweep"'], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == str(tmp_path / name)
    with pytest.raises(UserError, match="a path with control characters cannot be used on SLURM"):
        script_of(Profile(), tmp_path / "two\nlines")


def test_an_environment_to_submit_from_has_nothing_of_a_job() -> None:
    own = {"PATH": "/bin", "WANDB_API_KEY": "secret", "SLURM_CONF": "/etc/slurm.conf"}
    leaks = (
        "SLURM_JOB_ID",
        "SLURMD_NODENAME",
        "SBATCH_PARTITION",
        "SRUN_CPUS_PER_TASK",
        "RANK",
        "MASTER_PORT",
    )
    assert clean_environment(own | dict.fromkeys(leaks, "1")) == own
