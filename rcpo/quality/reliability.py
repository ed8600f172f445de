"""The reliability plot of a source classifier. Draws; `rcpo.quality.source` measures."""

from pathlib import Path

from rcpo.monitor.plot import CHOSEN, DPI, FAINT, STYLE, save
from rcpo.quality.source import Reliability


def plot_reliability(found: Reliability, path: Path) -> None:
    """PNG: the observed share of the target in each bin against the predicted one, and counts below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(5.5, 5.6), dpi=DPI, layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        above.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label="calibrated")
        above.plot(found.predicted, found.observed, color=CHOSEN, linewidth=2.2, marker="o", label="measured")
        above.set_xlim(0, 1)
        above.set_ylim(0, 1)
        above.set_ylabel("share that is of the target")
        above.set_title(f"Out-of-fold probabilities: ECE {found.ece:.3f}, AUC {found.auc:.3f}")
        above.legend(loc="upper left")
        below.bar(found.predicted, found.counts, width=0.05, color=CHOSEN)
        below.set_ylabel("responses")
        below.set_xlabel("predicted probability of the target")
        save(figure, path)
