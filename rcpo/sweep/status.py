"""All cells of a sweep now, with what SLURM's queue says where SLURM runs them. On top of `states` and
`slurm`."""

from rcpo.sweep.folder import SweepFolder
from rcpo.sweep.states import CellStatus, read_status


def read_statuses(sweep: SweepFolder) -> list[CellStatus]:
    """All cells now; of a sweep that SLURM runs, with what its queue says."""
    if sweep.slurm.is_file():
        from rcpo.sweep.slurm import submit as slurm

        return slurm.read_statuses(sweep)
    return [read_status(sweep, cell, None) for cell in sweep.read_cells()]
