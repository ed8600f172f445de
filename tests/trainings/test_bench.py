"""`rcpo bench` on tiny shapes: what is compared does the same work, numbers are what they say, and nothing is
said of the seconds themselves.

Most blocks run in forked processes here, because each process of its own imports for seconds; one bench runs
as users type it, on two ranks.
"""

import gzip
import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import forked
from helpers.forks import run_forked
from rcpo import cli
from rcpo.bench import curve, gpu, loops, plan, profiled
from rcpo.bench.machine import model_flops, peak_tflops
from rcpo.bench.plan import Outcome, compare_first_steps, run_bench
from rcpo.bench.shares import BUCKETS
from rcpo.bench.table import as_json, seconds_per_token, speeds
from rcpo.bench.work import load_pairs, random_pairs, save_pairs
from rcpo.commands.bench import options_of
from rcpo.commands.parser import command_parser
from rcpo.common.errors import UserError
from rcpo.models.logprobs import CHUNK_ELEMENTS, KEPT_ELEMENTS

TINY = [
    "--shape", "layers=1,hidden=16,intermediate=24,heads=2,vocabulary=997",
    "--lengths", "prompt=12,response=9", "--repeats", "1",
    "model.attention=eager", "train.pairs_per_step=4", "train.pairs_per_device=2",
]  # fmt: skip


def bench(folder: Path, *words: str) -> Outcome:
    options = options_of(command_parser("bench").parse([*TINY, *words]))
    return run_bench(options, folder, lambda line: None)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One bench of nearly everything."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_run_processes", run_forked)
        return bench(
            folder, "--calibrations", "off,exact", "--variant", "train.share_prefix=true",
            "--baseline", "plain,response", "--steps", "3", "--profile", str(folder / "trace.json"),
        )  # fmt: skip


@pytest.mark.timeout(500)
def test_a_bench_on_two_ranks_as_users_type_it(tmp_path: Path) -> None:
    words = [*TINY, "--calibrations", "off", "--steps", "1", "launch.processes=2", "--json", "b.json"]
    done = forked.rcpo("bench", *words, cwd=tmp_path, seconds=450)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| off +\|", done.stdout, re.MULTILINE)
    assert "4 pairs a step, 2 a micro-batch, 42 tokens a pair" in done.stdout
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["command"].startswith("rcpo bench --shape layers=1")
    assert written["work"]["ranks"] == 2
    assert {"date", "processor", "versions", "git_commit"} <= set(written["machine"])
    off = written["contenders"]["off"]
    assert off["computed"] == 1.0  # both ranks' micro-batches of one step
    assert off["shares"]["communication"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "b.json"]


def test_all_contenders_have_the_same_first_step(outcome: Outcome) -> None:
    assert set(outcome.checks) == {"off train.share_prefix=true", "plain", "response"}
    for difference in outcome.checks.values():
        assert set(difference) == {"loss", "gradient"}
        assert max(difference.values()) < 1e-4


def test_losses_of_the_first_timed_steps_say_something_of_the_pairs(outcome: Outcome) -> None:
    losses = {name: blocks[0]["losses"] for name, blocks in outcome.blocks.items()}
    assert all(own == pytest.approx(losses["off"], abs=1e-4) for own in losses.values())
    assert all(abs(loss - math.log(2)) > 1e-5 for loss in losses["off"])


def test_every_second_step_of_exact_is_measured_and_weighed_as_one_in_eight(outcome: Outcome) -> None:
    exact = next(each for each in outcome.contenders if each.name == "exact")
    assert exact.every == 8
    assert outcome.blocks["exact"][0]["measured"] == [False, True, False]
    assert outcome.blocks["off"][0]["measured"] == [False, False, False]


def test_each_step_is_timed_and_the_shares_add_up(outcome: Outcome) -> None:
    for blocks in outcome.blocks.values():
        assert len(blocks[0]["seconds"]) == 3
        assert min(*blocks[0]["seconds"], *blocks[0]["cpu_seconds"]) > 0
        assert blocks[0]["peak_gb"] > 0.1
    assert set(outcome.shares) == {"off", "exact", "off train.share_prefix=true"}
    for shares in outcome.shares.values():
        assert set(shares) == set(BUCKETS)
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["head"] > 0
        assert shares["body"] > 0
    assert outcome.shares["exact"]["calibration"] > 0
    assert outcome.shares["off"]["calibration"] == 0


def test_shared_prompts_are_computed_once(outcome: Outcome) -> None:
    """12 + 9 + 9 of 2 (12 + 9) tokens."""
    found = speeds(outcome)
    assert found["off train.share_prefix=true"].computed == pytest.approx(30 / 42)
    assert found["off"].computed == found["plain"].computed == 1
    assert found["off"].ratio == found["off"].ratio_low == found["off"].ratio_high == 1


def test_the_trace_is_one_of_chromes_and_the_largest_items_are_told(outcome: Outcome) -> None:
    items = outcome.profile["items"]
    assert items[0]["milliseconds"] >= items[-1]["milliseconds"]
    assert outcome.profile["milliseconds"] > items[0]["milliseconds"]
    assert outcome.profile["waits"]["aten::_local_scalar_dense"] > 0
    assert any("TokenLogProbs" in item["name"] or "mm" in item["name"] for item in items)
    written = as_json(outcome, {}, "rcpo bench")
    assert json.loads(json.dumps(written)) == written


def test_a_baseline_that_computes_something_else_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sharper(model: Any, batch: Any) -> Tensor:
        return loops.plain_token_logps(model, batch) * 1.01

    monkeypatch.setattr(plan, "_run_processes", run_forked)
    monkeypatch.setitem(loops.LOOPS, "plain", sharper)
    with pytest.raises(UserError, match=r"^plain: its first step is not that of off: .*nothing is compared$"):
        bench(tmp_path, "--calibrations", "off", "--baseline", "plain", "--steps", "1")


def test_why_a_block_failed_is_said(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("warming up\nmodel.path=x: no such folder\n")
    assert isinstance(plan._fault(2, log), UserError)
    assert str(plan._fault(2, log)) == "model.path=x: no such folder"
    assert isinstance(plan._fault(1, log), RuntimeError)
    assert "SIGKILL" in str(plan._fault(-9, log))


def test_first_steps_are_compared_by_norms_and_random_products() -> None:
    """Differences 0.1 of a gradient of norm 5, and 0.001 of one of norm 0.002, which counts over 0.005."""
    ours = {"losses": [0.7], "gradient": {"a": [5.0, 1.0, -2.0], "b": [0.002, 0.001, 0.0]}}
    theirs = {"losses": [0.6], "gradient": {"a": [5.0, 1.1, -2.0], "b": [0.002, 0.002, 0.0]}}
    found = compare_first_steps(ours, theirs)
    assert found["loss"] == pytest.approx(0.1)
    assert found["gradient"] == pytest.approx(0.001 / 0.005, rel=1e-3)
    lacking = {"losses": [0.7], "gradient": {"a": [5.0, 1.0, -2.0]}}
    assert compare_first_steps(ours, lacking)["gradient"] == math.inf


def test_measured_steps_are_weighed_as_in_a_long_run() -> None:
    """2 s for 10 tokens unmeasured, 6 s for 20 measured: .2 and .3 a token; one in 8: .2 * 7/8 + .3 / 8."""
    found = {"seconds": [2.0, 6.0], "measured": [False, True]}
    assert seconds_per_token(found, [10, 20], 8) == pytest.approx(0.2125)
    assert seconds_per_token(found, [10, 20], 1) == pytest.approx(8 / 30)
    assert seconds_per_token(found | {"cpu_seconds": [1.0, 3.0]}, [10, 20], 1, "cpu_seconds") == 4 / 30
    assert seconds_per_token(found | {"measured": [True, True]}, [10, 20], 8) == pytest.approx(8 / 30)


def test_operations_counted_by_hand() -> None:
    """One pair, two sides of 2 + 1 tokens: 6 tokens, 2 of them responses; P = 100, H = 4, L = 2, V = 10.
    Body 2*100*6 = 1200, attention 2*4*2*(9+9) = 288, head 2*10*4*2 = 160; three times for backward."""
    model = {"body_parameters": 100, "hidden": 4, "layers": 2, "vocabulary": 10, "trains_all": True}
    pairs = random_pairs(1, 2, 1, 10)
    assert model_flops(pairs, model) == 3 * (1200 + 288 + 160)
    assert model_flops(pairs, model | {"trains_all": False}) == 2 * (1200 + 288 + 160)


def test_peaks_of_known_gpus() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA L40S") == 362
    assert peak_tflops("NVIDIA GB200") == 2500
    assert peak_tflops("an unknown one") is None
    assert peak_tflops(None) is None


def test_random_lengths_are_as_spread_as_asked() -> None:
    """Median and the logarithm's standard deviation of 2,000 responses; none is longer than 4 medians."""
    pairs = random_pairs(1000, 40, 80, 10, spread=60)
    sides = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    lengths = torch.tensor([float(len(side.input_ids) - side.num_prompt) for side in sides])
    assert abs(float(lengths.median()) - 80) < 4
    assert abs(float(lengths.log().std()) - 0.6) < 0.03
    assert lengths.max() <= 320


def test_what_a_profile_says() -> None:
    """Overlapping spans of 0 to 4 and 6 to 7 cover 5; the words for a GPU and for a CPU."""
    assert profiled.covered([(6.0, 7.0), (0.0, 3.0), (1.0, 2.0), (2.0, 4.0)]) == 5.0
    seen = {"milliseconds": 812.4, "busy": 0.971, "waits": {"cudaStreamSynchronize": 1}, "items": []}
    said = "one step of off under the profiler: 812 ms; the device busy 97 %, the host waited for it once"
    assert profiled.in_words("off", seen) == said
    assert profiled.in_words("off", seen | {"waits": {}}).endswith("waited for it 0 times")
    assert profiled.in_words("off", seen | {"busy": None}).endswith(
        "ms; scalars read from tensors, each of them a wait on a GPU: 1"
    )


@pytest.mark.ci("more of bench")
def test_a_page_of_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--gpu` on this CPU: a section in bf16 with fp32 loops beside it, one that fails, one that is late."""
    monkeypatch.setattr(plan, "_run_processes", run_forked)
    seconds = iter([0.0, 1.0, 2.0, 99.0])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(seconds))
    words = (*TINY, "--steps", "1", "--calibrations", "off", "model.dtype=bfloat16")
    sections = [
        gpu.Section("in bf16", (*words, "--baseline", "plain"), profiled=True),
        gpu.Section("too long", (*words, "train.max_length=8")),
        gpu.Section("late", words),
    ]
    planned = [(each, options_of(command_parser("bench").parse(list(each.words)))) for each in sections]
    passed = gpu.run_sections(planned, tmp_path / "page.md", 60.0, lambda line: None)
    page = (tmp_path / "page.md").read_text()
    assert not passed
    assert re.search(r"^\| off +\|", page, re.MULTILINE)
    assert re.search(r"^\| plain +\|", page, re.MULTILINE)
    assert re.search(r"^MFU of product: off [0-9.]+ %, plain [0-9.]+ %\.$", page, re.MULTILINE)
    assert page.count("| largest items of one step") == 1
    assert re.search(r"^one step of off under the profiler: \d+ ms; scalars read ", page, re.MULTILINE)
    assert "The trace of that step: [page.1.trace.json.gz](page.1.trace.json.gz)" in page
    with gzip.open(tmp_path / "page.1.trace.json.gz") as stream:
        assert any("mm" in event.get("name", "") for event in json.load(stream)["traceEvents"])
    assert page.count("Failed: UserError: ") == 1
    assert page.count("Not run: 1 minutes were over.") == 1
    assert re.search(r"A bf16 matrix product attains [0-9.e-]+ TFLOP/s here", page)


@pytest.mark.ci("more of bench")
def test_every_section_is_a_bench_that_can_begin() -> None:
    """As far as its words can be checked without its model."""
    for section in [*gpu.SECTIONS, *map(gpu.rehearsed, gpu.SECTIONS)]:
        options = options_of(command_parser("bench").parse(list(section.words)))
        assert options.shape is not None
        assert options.lengths is not None
        resolved = plan._resolved(options.words)
        longest = options.lengths["prompt"] + options.lengths["response"]
        assert resolved.train.max_length >= longest * (4 if options.lengths["spread"] else 1)
        for variant in options.variants:
            plan._resolved([*options.words, *variant])
        if section.profiled:  # the last step, which a calibration that is measured at times has measured
            assert (options.num_warmup + options.num_steps - 1) % plan.MEASURED_EVERY == 0


def test_pairs_come_back_as_they_were(tmp_path: Path) -> None:
    pairs = random_pairs(3, 5, 2, 50)
    save_pairs(pairs, tmp_path / "pairs")
    assert load_pairs(tmp_path / "pairs") == pairs


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks cannot be reset here")
def test_memory_of_the_head_stays_where_that_of_full_logits_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "TOKENS", (1792, 5376))
    few, many = curve.head_curve(vocabulary=20_000, hidden_size=8, device=torch.device("cpu"))
    limit = 4 * (KEPT_ELEMENTS + 3 * CHUNK_ELEMENTS) / 1e9
    assert few.full_gb is not None
    assert many.full_gb is not None
    assert many.full_gb > 2.5 * few.full_gb
    assert 0 < few.chunked_gb < limit
    assert 0 < many.chunked_gb < limit
    assert many.full_gb > 3 * limit


MISTAKES = {
    "--baseline fast": "--baseline fast: no such baseline; choose of plain, response, trl, twice",
    "--baseline twice": "--baseline twice: is of images alone; leave it out, or add --images",
    "--images side=30": "--images side=30,patch=14,hidden=320,heads=5: side must be a multiple of patch",
    "--images side=28 --baseline plain": "--baseline plain: is of text alone; leave it out, or leave out",
    "--images side=28 model=tiny": "model=tiny: --images makes model and data itself; leave one of them out",
    "--shape width=3": "argument --shape: width=3: must be one of hidden=N, intermediate=N, ",
    "--shape hidden=10,heads=4": "--shape hidden=10,heads=4: hidden must be a multiple of twice the heads",
    "--lengths prompt=0": "argument --lengths: prompt=0: must be one of prompt=N, response=N, spread=N ",
    "--gpu gpu.md": "--gpu gpu.md: no CUDA device here; run it where one is, or type --rehearse for",
    "--steps 0": "argument --steps: 0: must be a whole number of at least 1",
    "--calibrations off,,on": "argument --calibrations: off,,on: must be names with commas between them",
    "--calibrations of": "calibration=of: no such option; did you mean calibration=off? ",
    "--json nowhere/b.json": "--json nowhere/b.json: its folder is not there; give a file in one that is",
    "--fast": "unrecognized arguments: --fast; `rcpo bench --help` lists words and flags",
    "optim.lr=fast": "optim.lr=fast: ",
    "--baseline plain launch.processes=2": "--baseline: baselines run on one rank; ",
    "--baseline trl objective=simpo": "objective=simpo: TRL has no such loss, or another one; type one of ",
    "--baseline plain objective=kto objective.kl=mismatched": "--baseline plain: does not score the mism",
    "--shape vocabulary=5 --lengths prompt=3": "model.path=",
    "--lengths prompt=100000": "train.max_length: the longest row has ",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "trl" or original(name))
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *words.split()])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.startswith(f"rcpo: {MISTAKES[words]}"), said
    assert said.count("\n") == 1


def test_without_trl_its_baseline_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--baseline trl: TRL is not installed; type pip install "):
        bench(tmp_path, "--baseline", "trl")


@pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install .[bench]"
)
def test_trl_has_the_same_first_step(tmp_path: Path) -> None:
    found = bench(tmp_path, "--calibrations", "off", "--baseline", "trl", "--steps", "1")
    assert max(found.checks["trl"].values()) < 1e-4
    assert speeds(found)["trl"].computed == 1
