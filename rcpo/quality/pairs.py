"""What can be said of pairs without a model, on the tokens that it will see: how far the two responses are
apart, and which pairs repeat or contradict each other. Called by `rcpo.commands.score`."""

from collections.abc import Sequence
from typing import NamedTuple

from rcpo.data.pairs import _side_digest
from rcpo.data.tokenize import TokenizedPair, TokenizedSide


class PairFacts(NamedTuple):
    """One pair; lengths and distances in response tokens."""

    row: int
    """Row number in the source."""
    digest: str
    """Of both sides' tokens: chosen, then rejected."""
    len_w: int
    len_l: int
    length_difference: int
    """len_w - len_l."""
    shared_prefix: int
    """Tokens that both responses begin with."""
    edit_distance: int
    """Fewest insertions, deletions and replacements that make one response of the other."""
    repeats: int | None
    """Row of the first pair with the same tokens, where that is an earlier one."""
    contradicts: int | None
    """Row of the first pair that prefers what this one rejects (A > B and B > A)."""


def describe_pairs(pairs: Sequence[TokenizedPair]) -> list[PairFacts]:
    """Facts of each pair, in the order of `pairs`."""
    digests = [(_side_digest(pair.chosen), _side_digest(pair.rejected)) for pair in pairs]
    first_rows: dict[tuple[str, str], int] = {}
    for pair, digest in zip(pairs, digests, strict=True):
        first_rows.setdefault(digest, pair.row)
    facts = []
    for pair, (of_chosen, of_rejected) in zip(pairs, digests, strict=True):
        y_w, y_l = response(pair.chosen), response(pair.rejected)
        first = first_rows[of_chosen, of_rejected]
        facts.append(
            PairFacts(
                row=pair.row,
                digest=of_chosen + of_rejected,
                len_w=len(y_w),
                len_l=len(y_l),
                length_difference=len(y_w) - len(y_l),
                shared_prefix=common_beginning(y_w, y_l),
                edit_distance=edit_distance(y_w, y_l),
                repeats=None if first == pair.row else first,
                contradicts=first_rows.get((of_rejected, of_chosen)),
            )
        )
    return facts


def response(side: TokenizedSide) -> list[int]:
    return side.input_ids[side.num_prompt :]


def common_beginning(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(left), len(right))
    return next((idx for idx in range(shorter) if left[idx] != right[idx]), shorter)


def edit_distance(left: Sequence[int], right: Sequence[int]) -> int:
    """Levenshtein distance. A column of the table of distances is held as two whole numbers, whose bits say
    where it rises and falls by one: linear time in Python. Myers 1999, as Hyyro 2003 writes it."""
    where: dict[int, int] = {}
    for idx, token in enumerate(left):
        where[token] = where.get(token, 0) | 1 << idx
    if not left:
        return len(right)
    everywhere, last = (1 << len(left)) - 1, 1 << (len(left) - 1)
    rises, falls, distance = everywhere, 0, len(left)
    for token in right:
        equal = where.get(token, 0)
        diagonal = ((((equal & rises) + rises) ^ rises) | equal | falls) & everywhere
        across_rises = (falls | ~(diagonal | rises)) & everywhere
        across_falls = rises & diagonal
        distance += bool(across_rises & last) - bool(across_falls & last)
        across_rises, across_falls = across_rises << 1 | 1, across_falls << 1
        rises = (across_falls | ~(diagonal | across_rises)) & everywhere
        falls = across_rises & diagonal & everywhere
    return distance
