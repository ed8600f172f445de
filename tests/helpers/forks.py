"""Blocks of a bench in forks of this process, which has imported what they need."""

import os
import traceback
from pathlib import Path

from rcpo.bench import block


def run_forked(file: Path, num_ranks: int) -> None:
    """`plan._run_processes` for one rank, with everything imported already."""
    assert num_ranks == 1
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = block.main([str(file)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
