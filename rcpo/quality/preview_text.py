"""What `rcpo data` prints: the account, histograms of lengths, pairs with their scored part highlighted."""

import itertools
import re

from rich.console import Console
from rich.text import Text

from rcpo.quality.preview import PARTS, Preview, ShownPair, ShownPart
from rcpo.records.account import LOST
from rcpo.records.load import NOTE

BAR = 18
"""Columns of the longest bar."""
EIGHTHS = " ▏▎▍▌▋▊▉█"
STYLES = {"prompt": "", "chosen": "green", "rejected": "red"}
SPECIAL = re.compile("(⟦[^⟦⟧]*⟧)")


def print_preview(console: Console, preview: Preview) -> None:
    """In the order in which things happen to the data."""
    for line in preview.inputs.account.lines():
        _print(console, Text(line))
    for line in preview.notes:
        _print(console, Text(line, style="bold" if line.startswith(f"{NOTE}{LOST}") else ""))
    console.print()
    for line in _length_lines(preview):
        _print(console, Text(line))
    for pair in preview.pairs:
        console.print()
        _print_pair(console, pair)


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)


def _length_lines(preview: Preview) -> list[str]:
    """One histogram a column."""
    edges, histograms = preview.edges(), preview.histograms()
    most = max(max(counts) for counts in histograms.values())
    digits = len(str(most))
    labels = [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]
    width = max(len("tokens"), *map(len, labels))
    heads = [part.ljust(BAR + digits + 1) for part in histograms]
    lines = ["  ".join(["tokens".ljust(width), *heads]).rstrip()]
    for place, label in enumerate(labels):
        counts = [of_part[place] for of_part in histograms.values()]
        cells = [f"{_bar(count, most)} {count if count else '':>{digits}}" for count in counts]
        lines.append("  ".join([label.rjust(width), *cells]).rstrip())
    while len(lines) > 2 and not lines[-1].strip("-0123456789 "):  # bins that nothing is in
        lines.pop()
    for name, values in preview.lengths().items():
        cut = preview.cuts[name]
        where = "from the left" if name == "prompt" else "from the right"
        lines.append(
            f"{name}: {sum(values) / len(values):.0f} tokens on average, {max(values)} at most"
            + (f"; {cut} of the pairs cut {where}" if cut else "")
        )
    return lines


def _bar(count: int, most: int) -> str:
    """As long as `count` is a share of `most`, to an eighth of a column; something for whatever is not 0."""
    eighths = max(round(8 * BAR * count / most), 1 if count else 0)
    full, rest = divmod(eighths, 8)
    return (EIGHTHS[8] * full + (EIGHTHS[rest] if rest else "")).ljust(BAR)


def _print_pair(console: Console, pair: ShownPair) -> None:
    _print(console, Text(f"row {pair.row}, {pair.use}", style="bold"))
    for image in pair.images:
        size = f"{image.width} x {image.height} pixels, {image.tokens} tokens of the prompt"
        _print(console, Text(f"{_printable(image.name)}: {size}"))
    for name in PARTS:
        part: ShownPart | None = getattr(pair, name)
        if part is None:
            continue
        scored = "not scored" if name == "prompt" else "scored"
        cut = f", {part.cut} more cut off" if part.cut else ""
        _print(console, Text(f"{name} ({part.tokens} tokens, {scored}{cut})", style="bold"))
        _print(console, _highlighted(name, part))


def _highlighted(name: str, part: ShownPart) -> Text:
    """Scored text in colour and in « », special tokens dimmed, a mark where something is cut off."""
    text = Text("  ")
    if name == "prompt" and part.cut:
        text.append("✂ ", style="yellow")
    if name != "prompt":
        text.append("«", style=f"bold {STYLES[name]}")
    for piece in SPECIAL.split(part.text):
        is_special = SPECIAL.fullmatch(piece) is not None
        text.append(_printable(piece), style=f"dim {STYLES[name]}" if is_special else STYLES[name])
    if name != "prompt":
        text.append("»", style=f"bold {STYLES[name]}")
        if part.cut:
            text.append(" ✂", style="yellow")
    return text


def _printable(text: str) -> str:
    """Line ends as such, other control characters as Python writes them: data must not steer a terminal."""
    shown = "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )
    return shown.replace("\n", "⏎\n  ")
