"""Grids of runs: the sweep file, its frozen cells, what state each is in, and what runs them, here or by
SLURM. Does not train: a cell is a run, started by `rcpo resume`."""
