"""Runs side by side: from run folders to one table, figures and a report. Called by `rcpo.commands.compare`.

find (paths to folders) -> load (a folder to a `Run`) -> cells (runs to cells, what differs, what is left out)
-> statistics, table -> curves -> figures and page (HTML), static (PDF, PNG). Nothing here imports torch.
"""
