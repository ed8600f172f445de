"""`rcpo train [GROUP=OPTION] [KEY=VALUE] ...`: compose, validate, freeze, start the workers."""


def run(words: list[str]) -> int:
    """Train as configured; returns the exit code. Raises UserError for bad input, before anything is written."""
    from rcpo.config.compose import compose

    tree = compose(words)
    if tree is None:
        return 0
    from rcpo.config.resolve import resolve
    from rcpo.config.schema import validate
    from rcpo.distributed import joined_world_size
    from rcpo.launch import start

    config = resolve(validate(tree), joined_world_size())
    return start(config, resume=False)
