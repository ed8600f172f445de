"""The one exception for what a user can mend. `rcpo.cli` prints it as one line and exits with code 2."""


class UserError(Exception):
    """Bad input. The message is one line: the value seen, the rule, and what to type instead."""
