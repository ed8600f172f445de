"""`rcpo resume RUN`: continue a run from its newest complete checkpoint."""

from rcpo.errors import UserError

HELP = """usage: rcpo resume RUN

Continue the run in the folder RUN from its newest complete checkpoint, with the config frozen in
RUN/config.yaml. A run without a checkpoint starts again from its first step. A run that is done is left as it
is."""


def run(words: list[str]) -> int:
    """Resume; returns the exit code. Raises UserError when RUN is no run or cannot be continued."""
    if words[:1] in (["-h"], ["--help"]):
        print(HELP)
        return 0
    if len(words) != 1:
        raise UserError(f"resume takes one run folder, not {len(words)} words; type rcpo resume RUN")
    from rcpo.run_folder import open_run

    folder, _ = open_run(words[0])
    if folder.read_run().get("status") == "done":
        print(f"{folder.path} is done; its model is {folder.final}")
        return 0
    from rcpo.launch import resume

    return resume(words[0])
