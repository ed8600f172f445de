"""Importing large libraries. Loads nothing itself."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """While open, Python does not search for garbage; what was made until the end is never searched again.

    An import of torch, transformers or DeepSpeed makes over a million objects that all stay. Python searches
    them for unused cycles again and again while they grow: 10 to 25 % of the imports' time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
