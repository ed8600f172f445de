"""Exceptions whose message is all that a user needs: `rcpo.cli` prints it as one line and exits with their
code."""


class UserError(Exception):
    """Bad input. The message is one line: the value seen, the rule, and what to type instead."""

    exit_code = 2
    status = "failed"
    """What run.json says of a run that ended so."""

    def __str__(self) -> str:
        """One line whatever the value holds: line ends and other control characters as Python writes them."""
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in super().__str__())


class NonFiniteError(UserError):
    """A loss, log-probability or gradient was not finite; the weights are as they were before that step."""

    exit_code = 3


class SaveError(UserError):
    """A checkpoint could not be written; the ones before it are whole."""

    exit_code = 4


class StoppedError(UserError):
    """SIGTERM or SIGUSR2 asked the run to stop; `rcpo resume` goes on. The code is EX_TEMPFAIL of
    sysexits.h."""

    exit_code = 75
    status = "preempted"


def error_of(exit_code: int, line: str) -> BaseException:
    """What a process that went on would have raised, from another one's exit code and line."""
    if exit_code == 130:
        return KeyboardInterrupt(line)
    kinds = {kind.exit_code: kind for kind in (UserError, NonFiniteError, SaveError, StoppedError)}
    return kinds[exit_code](line) if exit_code in kinds else RuntimeError(line)


def shortened(text: str) -> str:
    """`text` as a message shows it: the beginning alone of what is too long to read."""
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text)} characters)"


def first_line(error: BaseException) -> str:
    """First line of what a library says, short enough for one line."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:200] for line in lines if line), type(error).__name__)
