"""From blocks to numbers, a table for people and JSON for programs."""

from statistics import fmean, median
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.table import Table

from rcpo.bench.machine import model_flops, peak_tflops
from rcpo.bench.plan import Contender, Outcome
from rcpo.bench.profiled import in_words
from rcpo.bench.shares import BUCKETS
from rcpo.bench.work import num_tokens
from rcpo.config.names import data_label, model_label


class Speed(NamedTuple):
    """Medians over a contender's blocks, and how it stands to the first contender, round by round."""

    pairs_per_second: float
    tokens_per_second: float
    """Tokens of the data, prompt and response of both sides; padding does not count."""
    computed: float
    """Tokens that went through the model over tokens of the data: above 1 padding, below 1 shared prompts."""
    peak_gb: float
    tflops: float
    """10^12 operations a second that the work asks for, whatever was done (`rcpo.bench.machine`)."""
    mfu: float | None
    """The same over the GPU's bf16 peak; None where that is not known."""
    ratio: float
    """Pairs a second over the first contender's, median of rounds."""
    ratio_low: float
    ratio_high: float
    cpu_ratio: float
    """The first contender's processor time for a token over this one's: the ratio where others use the same
    cores; with one thread it is the steadier one."""


def seconds_per_token(block: dict[str, Any], tokens: list[int], every: int, clock: str = "seconds") -> float:
    """Of a block's timed steps; where one step of `every` is measured, the two kinds of steps are weighed as
    a long run does."""
    each = [took / num for took, num in zip(block[clock], tokens, strict=True)]
    kinds = [
        [value for value, is_measured in zip(each, block["measured"], strict=True) if is_measured == wanted]
        for wanted in (True, False)
    ]
    if every == 1 or not all(kinds):
        return sum(block[clock]) / sum(tokens)
    return fmean(kinds[0]) / every + fmean(kinds[1]) * (every - 1) / every


def speeds(outcome: Outcome) -> dict[str, Speed]:
    """By contender, in order."""
    pairs = [outcome.pairs[idx] for batch in outcome.batches for idx in batch]
    tokens = [num_tokens([outcome.pairs[idx] for idx in batch]) for batch in outcome.batches]
    per_pair = sum(tokens) / len(pairs)
    flops = model_flops(pairs, outcome.reference["model"]) / sum(tokens)
    rates = {
        contender.name: [
            1 / seconds_per_token(block, tokens, contender.every) for block in outcome.blocks[contender.name]
        ]
        for contender in outcome.contenders
    }
    costs = {
        contender.name: median(
            seconds_per_token(block, tokens, contender.every, "cpu_seconds")
            for block in outcome.blocks[contender.name]
        )
        for contender in outcome.contenders
    }
    first = next(iter(rates.values()))
    found = {}
    for contender in outcome.contenders:
        blocks, own = outcome.blocks[contender.name], rates[contender.name]
        ratios = [mine / base for mine, base in zip(own, first, strict=True)]
        rate = median(own)
        peak = peak_tflops(blocks[0]["gpu"])
        num_ranks = contender.config.world_size()
        found[contender.name] = Speed(
            pairs_per_second=rate / per_pair,
            tokens_per_second=rate,
            computed=sum(blocks[0]["computed_tokens"]) * num_ranks / sum(tokens),
            peak_gb=median(block["peak_gb"] for block in blocks),
            tflops=rate * flops / 1e12,
            mfu=None if peak is None else rate * flops / 1e12 / peak / num_ranks,
            ratio=median(ratios),
            ratio_low=min(ratios),
            ratio_high=max(ratios),
            cpu_ratio=next(iter(costs.values())) / costs[contender.name],
        )
    return found


def as_json(outcome: Outcome, machine: dict[str, Any], command: str) -> dict[str, Any]:
    """Everything, and each block's raw numbers."""
    return {
        "command": command,
        "machine": machine,
        "work": _work(outcome),
        "reference": outcome.reference,
        "checks": outcome.checks,
        "contenders": {
            name: speed._asdict() | {"shares": outcome.shares.get(name), "blocks": outcome.blocks[name]}
            for name, speed in speeds(outcome).items()
        },
        "profile": outcome.profile,
    }


def _work(outcome: Outcome) -> dict[str, Any]:
    config = outcome.contenders[0].config
    timed = [outcome.pairs[idx] for batch in outcome.batches for idx in batch]
    return {
        "model": model_label(config),
        "parameters": outcome.reference["model"]["parameters"],
        "dtype": config.model.dtype,
        "objective": config.objective,
        "data": data_label(config),
        "pairs_per_step": config.train.pairs_per_step,
        "pairs_per_device": config.train.pairs_per_device,
        "ranks": config.world_size(),
        "stage": config.zero_stage,
        "timed_steps": len(outcome.batches),
        "tokens_per_pair": num_tokens(timed) / len(timed),
    }


def tables(outcome: Outcome, console: Console) -> Group:
    """What a person reads."""
    style = box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN
    parts: list[Any] = [_speed_table(outcome, style)]
    if outcome.shares:
        parts.append(_share_table(outcome, style))
    if outcome.profile:
        parts.append(_profile_table(outcome.profile["items"], style))
    return Group(*parts)


def _speed_table(outcome: Outcome, style: box.Box) -> Table:
    found = speeds(outcome)
    base = outcome.contenders[0].name
    has_mfu = any(speed.mfu is not None for speed in found.values())
    table = Table(box=style)
    table.add_column("", no_wrap=True)
    for title in ("pairs/s", "tokens/s", "computed", "peak GB", "MFU" if has_mfu else "TFLOP/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for title in (f"speed over {base}", "by CPU time"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, speed in found.items():
        table.add_row(
            name,
            f"{speed.pairs_per_second:.3g}",
            f"{speed.tokens_per_second:.4g}",
            f"{speed.computed:.2f}",
            f"{speed.peak_gb:.2f}",
            f"{speed.tflops:.3g}" if speed.mfu is None else f"{100 * speed.mfu:.1f} %",
            _with_range(speed),
            f"{speed.cpu_ratio:.3f}",
        )
    return table


def _with_range(speed: Speed) -> str:
    """The ratio, and its range where there was one."""
    if speed.ratio_low == speed.ratio_high:
        return f"{speed.ratio:.3f}"
    return f"{speed.ratio:.3f} ({speed.ratio_low:.3f} to {speed.ratio_high:.3f})"


def _share_table(outcome: Outcome, style: box.Box) -> Table:
    table = Table(box=style)
    table.add_column("share of time (%)", no_wrap=True)
    for bucket in BUCKETS:
        table.add_column(bucket, justify="right", no_wrap=True)
    for name, shares in outcome.shares.items():
        table.add_row(name, *(f"{100 * shares[bucket]:.1f}" for bucket in BUCKETS))
    return table


def _profile_table(items: list[dict[str, Any]], style: box.Box) -> Table:
    table = Table(box=style)
    for title in ("largest items of one step", "ms", "calls", "%"):
        table.add_column(title, justify="left" if title.startswith("largest") else "right", no_wrap=True)
    for item in items:
        name = item["name"] if len(item["name"]) <= 60 else item["name"][:57] + "..."
        table.add_row(name, f"{item['milliseconds']:.1f}", str(item["calls"]), f"{100 * item['share']:.1f}")
    return table


def remarks(outcome: Outcome) -> list[str]:
    """What the tables do not say."""
    work, reference = _work(outcome), outcome.reference
    step = speeds(outcome)[outcome.contenders[0].name]
    once = reference["seconds"] / reference["num_pairs"] * step.pairs_per_second
    blocks = [block for own in outcome.blocks.values() for block in own]
    load = [value for block in blocks for value in block["load_average"]]
    lines = [
        f"{work['pairs_per_step']} pairs a step, {work['pairs_per_device']} a micro-batch, "
        f"{work['tokens_per_pair']:.0f} tokens a pair (both sides), {work['parameters'] / 1e6:.4g} M "
        f"parameters, {work['dtype']}; {work['timed_steps']} timed steps a block, "
        f"{len(next(iter(outcome.blocks.values())))} rounds, {blocks[0]['threads']} threads, load average "
        f"{min(load):.1f} to {max(load):.1f}",
        f"reference log-probs: {reference['num_pairs'] / reference['seconds']:.3g} pairs/s, once for all "
        f"runs of a model and its data; {100 * once:.0f} % of one epoch of {outcome.contenders[0].name}",
    ]
    lines += [_weighed(each) for each in outcome.contenders if each.every > 1]
    lines += [
        f"first step of {name} against {outcome.contenders[0].name}: "
        + ", ".join(f"{what} differs by {value:.1e}" for what, value in found.items())
        for name, found in outcome.checks.items()
    ]
    if outcome.profile:
        lines.append(in_words(outcome.contenders[0].name, outcome.profile))
    return lines


def _weighed(contender: Contender) -> str:
    return f"{contender.name}: one measured step in {contender.every}, as after its warm-up"
