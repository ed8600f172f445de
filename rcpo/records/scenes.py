"""Pictures made on the spot with a question each: the right answer is chosen, a wrong one is rejected.

Owns the pictures of `data=shapes`, coloured squares and circles on a grid, its sentences and their words (the
vocabulary of `model=tiny_vision`). Two kinds of question, "how many red squares ?" and "what is left of the
blue circle ?". Nothing in a question tells its answer. A wrong answer is a near miss, or the usual guess that
goes by the words alone, which `model=tiny_vision` has learned to make now and then.

Called by `rcpo.records.load` and `rcpo.builtin.make_tiny_vision`.
"""

import io
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rcpo.records.arithmetic import assistant_turn, user_turn
from rcpo.records.images import Image
from rcpo.records.messages import PLACE
from rcpo.records.record import PreferenceRecord

if TYPE_CHECKING:
    import PIL.Image

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 220)}
FORMS = ("square", "circle")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
"""Number words; a number's place is its value."""
WORDS = (
    *COLOURS, *FORMS, *(f"{form}s" for form in FORMS), *NUMBERS,
    "how", "many", "?", "there", "are", "what", "is", "left", "of", "the", "it", "a", ".",
)  # fmt: skip
"""Every word that a question or an answer can hold."""
BACKGROUND = (245, 245, 245)
CELLS_A_SIDE, PIXELS_A_CELL = 3, 8
SIZE = CELLS_A_SIDE * PIXELS_A_CELL
"""Pixels of a picture's side."""
LARGEST, USUAL = 4, 2
"""The largest right number, and the one that is guessed."""
MISSES = (-2, -1, 1, 2)
"""How far a near miss of a number is from the right one."""
FILLED = 0.6
"""Share of the cells that hold something, of those that the question leaves open."""


@dataclass(frozen=True)
class Thing:
    """What a cell holds."""

    colour: str
    form: str

    def __str__(self) -> str:
        return f"{self.colour} {self.form}"


THINGS = tuple(Thing(colour, form) for colour in COLOURS for form in FORMS)


@dataclass(frozen=True)
class Scene:
    """A picture and its question."""

    cells: tuple[Thing | None, ...]
    """Row by row."""
    asked: Thing
    counts: bool
    """Whether the question is how many of `asked` there are; else, what is left of the only one."""

    def question(self) -> str:
        """Such as "how many red squares ?" or "what is left of the blue circle ?"."""
        return f"how many {self.asked}s ?" if self.counts else f"what is left of the {self.asked} ?"

    def answer(self) -> str:
        """The right one, such as "there are two red squares ." or "it is a green circle ."."""
        if self.counts:
            return self._number(self.cells.count(self.asked))
        left = self.cells[self.cells.index(self.asked) - 1]
        assert left is not None
        return _being(left)

    def near_misses(self) -> list[str]:
        """Of a number, up to two off; of a thing, another colour or the other form."""
        if self.counts:
            right = self.cells.count(self.asked)
            return [self._number(right + off) for off in MISSES if 0 <= right + off < len(NUMBERS)]
        left = self.cells[self.cells.index(self.asked) - 1]
        assert left is not None
        return [
            _being(thing)
            for thing in THINGS
            if thing != left and (thing.colour == left.colour or thing.form == left.form)
        ]

    def usual_guess(self) -> str:
        """What the words alone suggest: "two", or a thing of the asked one's colour and the other form. It
        may be right."""
        if self.counts:
            return self._number(USUAL)
        (other,) = (form for form in FORMS if form != self.asked.form)
        return _being(Thing(self.asked.colour, other))

    def draw_wrong(self, rng: random.Random) -> str:
        """The usual guess with probability 1/2, where it is wrong; else a near miss, all equally likely."""
        if rng.random() < 0.5 and self.usual_guess() != self.answer():
            return self.usual_guess()
        return rng.choice(self.near_misses())

    def picture(self) -> "PIL.Image.Image":
        """`SIZE` pixels a side, RGB."""
        import PIL.Image
        import PIL.ImageDraw

        picture = PIL.Image.new("RGB", (SIZE, SIZE), BACKGROUND)
        draw = PIL.ImageDraw.Draw(picture)
        for place, thing in enumerate(self.cells):
            if thing is not None:
                row, column = divmod(place, CELLS_A_SIDE)
                left, top = column * PIXELS_A_CELL, row * PIXELS_A_CELL
                box = (left + 1, top + 1, left + PIXELS_A_CELL - 2, top + PIXELS_A_CELL - 2)
                (draw.rectangle if thing.form == "square" else draw.ellipse)(box, fill=COLOURS[thing.colour])
        return picture

    def image(self) -> Image:
        """The picture as the bytes of a PNG."""
        stream = io.BytesIO()
        self.picture().save(stream, format="PNG")
        return Image(None, stream.getvalue())

    def _number(self, number: int) -> str:
        return f"there are {NUMBERS[number]} {self.asked}s ."


def _being(thing: Thing) -> str:
    return f"it is a {thing} ."


def draw_scene(rng: random.Random) -> Scene:
    """Both kinds of question are as likely, and every number up to `LARGEST`, and every thing to the left."""
    asked, counts = rng.choice(THINGS), rng.random() < 0.5
    others = [thing for thing in THINGS if thing != asked]
    num = rng.randint(0, LARGEST) if counts else 0
    cells: list[Thing | None] = [asked] * num
    cells += [rng.choice(others) if rng.random() < FILLED else None for _ in range(CELLS_A_SIDE**2 - num)]
    rng.shuffle(cells)
    if not counts:
        place = rng.choice([place for place in range(len(cells)) if place % CELLS_A_SIDE])
        cells[place - 1 : place + 1] = [rng.choice(others), asked]
    return Scene(tuple(cells), asked, counts)


def shapes_records(
    train_pairs: int, eval_pairs: int, seed: int
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """Training and held-out pairs, disjoint by picture and question; each set's rows are counted from 0. The
    held-out set depends on `seed` and `eval_pairs` alone."""
    held_out = draw_scenes(eval_pairs, f"held-out {seed}", set())
    train = draw_scenes(train_pairs, f"training {seed}", set(held_out))
    return _records(train, f"training misses {seed}"), _records(held_out, f"held-out misses {seed}")


def draw_scenes(num: int, seed: str, without: set[Scene]) -> list[Scene]:
    """So many, no scene twice and none of `without`; the same for the same arguments."""
    rng, found = random.Random(seed), dict[Scene, None]()
    while len(found) < num:
        scene = draw_scene(rng)
        if scene not in without:
            found[scene] = None
    return list(found)


def _records(found: list[Scene], seed: str) -> list[PreferenceRecord]:
    rng = random.Random(seed)
    return [
        PreferenceRecord(
            prompt=user_turn(PLACE + scene.question()),
            chosen=assistant_turn(scene.answer()),
            rejected=assistant_turn(scene.draw_wrong(rng)),
            row=row,
            images=(scene.image(),),
        )
        for row, scene in enumerate(found)
    ]
