"""How well scores before training rank what training did.

    python tests/helpers/ches_correlation.py BEFORE AFTER

BEFORE and AFTER are files of `rcpo score` for the model before training and for RUN/final, on the same data.
Prints Spearman's rank correlation of each score with the change of z_w of the pairs, for training and
held-out pairs. A script, not a test.
"""

import sys

import numpy as np

from rcpo.comparison.statistics import spearman
from rcpo.data.score_file import HELD_OUT, TRAIN, read_pair_scores

SCORES = ("ches", "ches_norm", "margin", "edit_distance", "shared_prefix", "length_difference", "len_w")


def main(before_path: str, after_path: str) -> None:
    before, after = read_pair_scores(before_path, "BEFORE"), read_pair_scores(after_path, "AFTER")
    print("| score | training pairs | held-out pairs |\n|---|---|---|")
    parts = []
    for split in (TRAIN, HELD_OUT):
        scored, now = before.of_split(split), after.of_split(split)
        if scored["digest"] != now["digest"]:
            sys.exit(f"{after_path}: has other {split} pairs than {before_path}")
        parts.append((scored, np.subtract(now["z_w"], scored["z_w"])))
    for name in SCORES:
        shown = " | ".join(f"{spearman(np.array(scored[name]), change):+.2f}" for scored, change in parts)
        print(f"| {name} | {shown} |")
    shown = " | ".join(f"{change.mean():+.2f} nats, n = {len(change)}" for _, change in parts)
    print(f"| mean change of z_w | {shown} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
