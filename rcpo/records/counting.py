"""Pictures made on the spot with a question each: the right count is chosen, a near miss is rejected.

Owns the pictures of `data=shapes`, coloured squares and circles on a grid, its sentences and their words (the
vocabulary of `model=tiny_vision`). Nothing in a question tells its answer: without the picture there is
nothing to go by. Called by `rcpo.records.load` and `rcpo.builtin.make_tiny_vision`.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

from rcpo.records.arithmetic import assistant_turn, user_turn
from rcpo.records.images import Image
from rcpo.records.messages import PLACE
from rcpo.records.record import PreferenceRecord

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220)}
SHAPES = ("squares", "circles")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
"""Number words; a number's place is its value."""
WORDS = (*COLOURS, *SHAPES, *NUMBERS, "how", "many", "?", "there", "are", ".")
"""Every word that a question or an answer can hold."""
CELLS_A_SIDE, PIXELS_A_CELL = 3, 8
SIZE = CELLS_A_SIDE * PIXELS_A_CELL
"""Pixels of a picture's side."""
LARGEST = 4
"""The largest right answer."""
MISSES = (-2, -1, 1, 2)
"""How far a near miss is from the right answer."""
Thing = tuple[str, str]


@dataclass(frozen=True)
class Scene:
    """A picture and its question."""

    cells: tuple[Thing | None, ...]
    """Colour and shape in each cell, row by row."""
    asked: Thing

    @property
    def answer(self) -> int:
        return self.cells.count(self.asked)

    def question(self) -> str:
        """Such as "how many red squares ?"."""
        return f"how many {self.asked[0]} {self.asked[1]} ?"

    def response(self, number: int) -> str:
        """Such as "there are two red squares ."."""
        return f"there are {NUMBERS[number]} {self.asked[0]} {self.asked[1]} ."

    def near_misses(self) -> list[int]:
        return [self.answer + off for off in MISSES if 0 <= self.answer + off < len(NUMBERS)]

    def image(self) -> Image:
        """The picture, `SIZE` pixels a side, as the bytes of a PNG."""
        import PIL.Image
        import PIL.ImageDraw

        picture = PIL.Image.new("RGB", (SIZE, SIZE), (245, 245, 245))
        draw = PIL.ImageDraw.Draw(picture)
        for place, thing in enumerate(self.cells):
            if thing is None:
                continue
            row, column = divmod(place, CELLS_A_SIDE)
            left, top = column * PIXELS_A_CELL, row * PIXELS_A_CELL
            box = (left + 1, top + 1, left + PIXELS_A_CELL - 2, top + PIXELS_A_CELL - 2)
            (draw.rectangle if thing[1] == "squares" else draw.ellipse)(box, fill=COLOURS[thing[0]])
        stream = io.BytesIO()
        picture.save(stream, format="PNG")
        return Image(None, stream.getvalue())


def draw_scene(rng: random.Random) -> Scene:
    """Every right answer up to `LARGEST` is as likely; other cells hold anything else, or nothing."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    asked = rng.choice(things)
    others = [thing for thing in things if thing != asked]
    number = rng.randint(0, LARGEST)
    cells: list[Thing | None] = [asked] * number
    cells += [
        rng.choice(others) if rng.random() < 0.6 else None for _ in range(CELLS_A_SIDE**2 - number)
    ]
    rng.shuffle(cells)
    return Scene(tuple(cells), asked)


def scenes(seed: str) -> Iterator[Scene]:
    """Without end, no scene twice; the same for the same seed."""
    rng, seen = random.Random(seed), set[Scene]()
    while True:
        scene = draw_scene(rng)
        if scene not in seen:
            seen.add(scene)
            yield scene


def shapes_records(
    train_pairs: int, eval_pairs: int, seed: int
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """Training and held-out pairs, disjoint by picture and question; each set's rows are counted from 0. The
    held-out set depends on `seed` and `eval_pairs` alone."""
    held_out = _first(eval_pairs, f"held-out {seed}", set())
    train = _first(train_pairs, f"training {seed}", set(held_out))
    return _records(train, f"training misses {seed}"), _records(held_out, f"held-out misses {seed}")


def _first(num: int, seed: str, without: set[Scene]) -> list[Scene]:
    found: list[Scene] = []
    for scene in scenes(seed):
        if len(found) == num:
            break
        if scene not in without:
            found.append(scene)
    return found


def _records(found: list[Scene], seed: str) -> list[PreferenceRecord]:
    rng = random.Random(seed)
    return [
        PreferenceRecord(
            prompt=user_turn(PLACE + scene.question()),
            chosen=assistant_turn(scene.response(scene.answer)),
            rejected=assistant_turn(scene.response(rng.choice(scene.near_misses()))),
            row=row,
            images=(scene.image(),),
        )
        for row, scene in enumerate(found)
    ]
