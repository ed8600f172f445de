"""train.deterministic: what a rank is told before anything is computed, and that it is untold afterwards."""

import os
from pathlib import Path

import pytest
import torch

import rcpo.training.loop
from helpers.cases import Case, Layout, make_config, write_inputs
from helpers.forked import in_a_fork
from rcpo.common.errors import UserError
from rcpo.launch import start
from rcpo.ranks.deterministic import VARIABLES, deterministic_algorithms, missing_algorithms_refused


def told() -> tuple[bool, list[str | None]]:
    return torch.are_deterministic_algorithms_enabled(), [os.environ.get(name) for name in VARIABLES]


def test_it_holds_while_open_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a user has set stays; buffers of DeepSpeed are not filled with nan."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with deterministic_algorithms(False):
        assert told() == (False, [None, None])
    with deterministic_algorithms(True):
        assert told() == (True, [":4096:8", "1"])
        assert not torch.empty(1000).isnan().all()
    assert told() == (False, [None, None])
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_algorithms(True):
        assert told() == (True, [":16:8", "1"])
    assert told() == (False, [":16:8", None])


def test_a_kernel_that_has_none_is_named() -> None:
    """As torch words it, in one line; other faults stay what they are."""
    with pytest.raises(UserError) as caught, missing_algorithms_refused():
        raise RuntimeError(
            "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off\ndeterminism"
        )
    assert str(caught.value) == (
        "train.deterministic=true: cumsum_cuda_kernel does not have a deterministic implementation; type "
        "train.deterministic=false, or another model.attention"
    )
    with pytest.raises(RuntimeError, match="another fault"), missing_algorithms_refused():
        raise RuntimeError("another fault")


@pytest.mark.ci("bf16")
@pytest.mark.parametrize("wanted", [True, False])
def test_a_rank_is_told_before_it_trains(wanted: bool, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    case = Case("dpo", "off", "llama", "sgd")
    config = make_config(
        tmp_path, tmp_path / "run", case, Layout(1, 8), f"train.deterministic={str(wanted).lower()}"
    )

    def work() -> None:
        def train(*args: object, **named: object) -> dict[str, object]:
            (tmp_path / "told").write_text(repr(told()))
            raise UserError("seen")

        rcpo.training.loop.train = train  # type: ignore[assignment]
        assert start.start(lambda: config) == 2

    in_a_fork(work)
    expected = (True, [":4096:8", "1"]) if wanted else (False, [None, None])
    assert (tmp_path / "told").read_text() == repr(expected)
