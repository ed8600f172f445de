"""Grids of runs: the sweep file, its frozen cells, what state each is in, and what runs them."""
