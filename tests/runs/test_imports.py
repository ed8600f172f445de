"""While large libraries are imported, Python searches for no garbage; afterwards it does again."""

import gc

import pytest

from rcpo.common.imports import quick_imports


def test_what_was_made_meanwhile_is_never_searched_again() -> None:
    frozen = gc.get_freeze_count()
    try:
        with quick_imports():
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(made)
        assert not any(one is made[0] for one in gc.get_objects())
    finally:
        gc.unfreeze()


def test_an_import_that_fails_leaves_the_search_on() -> None:
    try:
        with pytest.raises(ImportError), quick_imports():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
