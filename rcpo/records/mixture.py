"""A mixture of sources (data.mix): how many pairs of each are trained on, and which.

Owns the counts and the draw. Does not read (`rcpo.records.load`, which calls this).
"""

import random
from collections.abc import Sequence
from fractions import Fraction

from rcpo.common.errors import UserError
from rcpo.config.schema import MixPart
from rcpo.records.record import PreferenceRecord


def name_of(part: MixPart) -> str:
    """Its paths, for the report."""
    return part.path if isinstance(part.path, str) else ", ".join(part.path)


def counts_of(available: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Pairs of each source: as many as there can be in these proportions with no pair twice. One source at
    least gives all that it has; counts are rounded so that their sum is the largest whole number of pairs."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    total = int(min(num / share for num, share in zip(available, shares, strict=True)))
    quotas = [total * share for share in shares]
    counts = [int(quota) for quota in quotas]
    by_rest = sorted(range(len(quotas)), key=lambda idx: (counts[idx] - quotas[idx], idx))
    for idx in by_rest[: total - sum(counts)]:
        counts[idx] += 1
    return counts


def drawn(
    parts: Sequence[MixPart],
    sources: Sequence[list[PreferenceRecord]],
    seed: int,
    report: list[str],
    note: str,
) -> list[PreferenceRecord]:
    """The mixture's pairs: `counts_of` each source, drawn by `seed`, in its order; the sources one behind
    the other, since the sampler shuffles. `report` gets the counts, with `note` before them. Raises UserError
    where a source would give nothing."""
    weights = [part.weight for part in parts]
    counts = counts_of([len(source) for source in sources], weights)
    for part, num in zip(parts, counts, strict=True):
        if not num:
            raise UserError(
                f"data.mix: {sum(counts)} pairs in these proportions have none of {name_of(part)}, whose "
                f"weight is {part.weight:g} of {sum(weights):g}; give more pairs of the others, or a larger "
                "weight"
            )
    said = (
        f"{num} of {len(source)} pairs of {name_of(part)} ({num / sum(counts):.1%})"
        for part, source, num in zip(parts, sources, counts, strict=True)
    )
    report.append(f"{note}data.mix: {'; '.join(said)}, drawn by data.seed={seed}")
    found = []
    for idx, (source, num) in enumerate(zip(sources, counts, strict=True)):
        # A seed for each: sources whose rows are alike (two annotators, say) are drawn apart.
        chosen = random.Random(f"{seed} {idx}").sample(range(len(source)), num)
        found += [source[row] for row in sorted(chosen)]
    return found
