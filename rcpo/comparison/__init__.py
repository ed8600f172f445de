"""Runs side by side: from run folders, or W&B, to one table with its statistics and what it says in words.
Called by `rcpo.commands.compare` and `rcpo.library.compare`.

find (words to folders) -> load, metrics_cache, from_wandb (to a `ComparedRun`) -> select -> groups (runs to
groups, what differs, what is left out) -> statistics, table, summary -> forms, terminal. held_out reads a
run's held-out pairs again. Draws nothing, and imports torch in held_out alone: pages are `rcpo.report`'s.
"""
