"""Whether a model still looks: held-out pairs with their own images, against the same with one another's, or
with blank ones.

A vision-language model may learn to prefer an answer by its words alone. Then a wrong image changes nothing.
Called by `rcpo.training.evaluating`; runs of text have no such numbers and no such pass.
"""

import dataclasses
from collections.abc import Sequence

from rcpo.data.pairs import SideLogProbs, TokenizedPair
from rcpo.data.pictures import Pictures
from rcpo.models.evaluation import LogProbModel, evaluate_logprobs


def with_wrong_images(pairs: Sequence[TokenizedPair]) -> dict[int, TokenizedPair]:
    """By its place, each pair that can have the images of another one: the next of those whose images are
    others, and stand as the same tokens. The same for the same pairs."""
    found: dict[int, TokenizedPair] = {}
    places = [place for place, pair in enumerate(pairs) if pair.pictures is not None]
    for number, place in enumerate(places):
        pair = pairs[place]
        own = _seen(pair)
        behind = (pairs[other] for other in places[number + 1 :] + places[:number])
        for other in behind:
            theirs = _seen(other)
            if theirs.digest != own.digest and theirs.written == own.written:
                found[place] = dataclasses.replace(pair, pictures=theirs)
                break
    return found


def with_blank_images(pairs: Sequence[TokenizedPair]) -> dict[int, TokenizedPair]:
    """By its place, each pair that has images, with blank ones of their sizes in their place."""
    return {
        place: dataclasses.replace(pair, pictures=pair.pictures.blank())
        for place, pair in enumerate(pairs)
        if pair.pictures is not None
    }


AGAINST = {
    "others": (("vision_gain", "vision_gain/chosen", "vision_gain/rejected"), with_wrong_images),
    "blank": (
        ("vision_gain_blank", "vision_gain_blank/chosen", "vision_gain_blank/rejected"), with_blank_images
    ),
}  # fmt: skip
"""Keys of a row by what metrics.vision_gain names, and which images are shown there."""


def _seen(pair: TokenizedPair) -> Pictures:
    assert pair.pictures is not None
    return pair.pictures


def vision_row(
    model: LogProbModel,
    pairs: Sequence[TokenizedPair],
    with_own: SideLogProbs,
    pad_id: int,
    pairs_per_device: int,
    against: str = "others",
) -> dict[str, float]:
    """Of the pairs that can have wrong images; nothing where there are none. One pass for each of what
    `against` (metrics.vision_gain: none, others, blank or both) names. Collective.

    vision_gain = share of pairs with z_w > z_l, with the right images minus with one another's
    vision_gain/chosen, vision_gain/rejected = mean of z with the right images minus z with those, nats
    vision_gain_blank, vision_gain_blank/... = the same with blank images in their place
    """
    row: dict[str, float] = {}
    for name in AGAINST if against == "both" else AGAINST.keys() & {against}:
        keys, shown = AGAINST[name]
        wrong = shown(pairs)
        if not wrong:
            continue
        z_w, z_l = evaluate_logprobs(model, list(wrong.values()), pad_id, pairs_per_device)
        own_w, own_l = (side[list(wrong)] for side in with_own)
        right = (own_w > own_l).double().mean() - (z_w > z_l).double().mean()
        lost = [(own - z).double().mean() for own, z in ((own_w, z_w), (own_l, z_l))]
        row |= dict(zip(keys, map(float, (right, *lost)), strict=True))
    return row
