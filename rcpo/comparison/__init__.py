"""Runs side by side: from run folders to a table, figures and a report. Called by `rcpo.commands.compare`,
and `live` by `rcpo.commands.watch`.

find (words to folders) -> load, metrics_cache (a folder to a `ComparedRun`) -> groups (runs to groups, what
differs, what is left out) -> statistics, table, summary -> forms, terminal; held_out, pair_ches (pairs read
again and scored) -> fallen; curves -> figures, page (HTML), static (PDF, PNG). Nothing here imports torch,
but for `held_out` and `pair_ches`, for the page alone.
"""
