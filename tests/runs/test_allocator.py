"""rcpo.ranks.allocator: what a CPU rank frees is not given back to the system."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from rcpo.ranks.allocator import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(77)
faults = []
for _ in range(4):
    block = bytearray(64 << 20)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""


def num_faults(kind: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_blocks_of_64_mib_are_faulted_in_once_and_not_every_time() -> None:
    kept = num_faults("kept")
    assert kept < 100
    # Three blocks of 64 MiB: 49,152 pages, or fewer where the system hands out huge ones.
    assert num_faults("default") > kept


RESIDENT = """
import sys
from rcpo.ranks.allocator import keep_freed_memory, return_freed_memory
if not keep_freed_memory():
    sys.exit(77)
def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
blocks = [bytearray(1 << 20) for _ in range(128)]
last = bytearray(1 << 20)  # above them in the heap: they are holes now
del blocks
held = resident_mib()
return_freed_memory()
print(held - resident_mib())
"""


def test_what_is_free_can_be_given_back_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, timeout=60)
    if done.returncode == 77:
        pytest.skip("not glibc")
    assert int(done.stdout) > 100, done.stderr
