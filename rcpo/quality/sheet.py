"""A contact sheet: images of pairs as one PNG, each with its row, size and tokens, and both responses.

Drawn by Pillow, with the letters that matplotlib brings. Called by `rcpo data --sheet`.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from rcpo.common.errors import UserError
from rcpo.quality.preview import ShownImage, ShownPair

COLUMNS = 4
CELL, TEXT_LINES, LINE, MARGIN = 240, 8, 13, 10
"""Pixels: of a thumbnail's longer side, lines of text below it, a line's height, and the space around."""
LETTERS = 36
"""Of a line."""


def write_sheet(pairs: Sequence[ShownPair], path: Path) -> int:
    """Write the images of these pairs, in their order; returns how many. Raises UserError where none of them
    has an image, or the file cannot be written."""
    import matplotlib
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont

    cells = [(pair, image) for pair in pairs for image in pair.images]
    if not cells:
        raise UserError("--sheet: none of the pairs that are shown has an image; give --pairs N or --row K")
    width, height = CELL + 2 * MARGIN, CELL + TEXT_LINES * LINE + 3 * MARGIN
    num_columns = min(COLUMNS, len(cells))
    num_lines = -(-len(cells) // num_columns)
    sheet = PIL.Image.new("RGB", (num_columns * width, num_lines * height), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    font = PIL.ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 11)
    for number, (pair, image) in enumerate(cells):
        left, top = number % num_columns * width + MARGIN, number // num_columns * height + MARGIN
        picture = image.image.open()
        scale = CELL / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        sheet.paste(picture.resize(size), (left, top))
        draw.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline="lightgray")
        for line, text in enumerate(_caption(pair, image)):
            draw.text((left, top + CELL + MARGIN + line * LINE), text, fill="black", font=font)
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise UserError(f"--sheet {path}: cannot be written ({error.strerror or error})") from None
    return len(cells)


def _caption(pair: ShownPair, image: ShownImage) -> list[str]:
    texts = [
        f"row {pair.row}, {pair.use}: {image.name}",
        f"{image.width} x {image.height}, {image.tokens} tokens",
    ]
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    texts += [f"{name}: {side.text}" for name, side in sides.items() if side is not None]
    lines = [line for text in texts for line in textwrap.wrap(text, LETTERS, max_lines=3, placeholder=" ...")]
    return lines[:TEXT_LINES]
