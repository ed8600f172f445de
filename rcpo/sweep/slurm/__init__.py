"""Sweeps as SLURM job arrays: profile, batch script, queue, submission. Nothing else in rcpo speaks to
SLURM."""
