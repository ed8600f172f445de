"""Pictures and questions of data=shapes: right answers read back from the pixels, near misses, seeds."""

import random

import pytest
from PIL.Image import Image as Picture

from rcpo.records.record import PreferenceRecord
from rcpo.records.scenes import (
    BACKGROUND,
    CELLS_A_SIDE,
    COLOURS,
    NUMBERS,
    PIXELS_A_CELL,
    WORDS,
    Scene,
    Thing,
    shapes_records,
)


def seen(picture: Picture) -> list[str | None]:
    """What the pixels of each cell show: a colour in the middle; a square also fills its corner."""
    found: list[str | None] = []
    names = {value: name for name, value in COLOURS.items()} | {BACKGROUND: None}
    for place in range(CELLS_A_SIDE**2):
        top, left = (PIXELS_A_CELL * number for number in divmod(place, CELLS_A_SIDE))
        colour = names[picture.getpixel((left + PIXELS_A_CELL // 2, top + PIXELS_A_CELL // 2))]
        form = "circle" if picture.getpixel((left + 1, top + 1)) == BACKGROUND else "square"
        found.append(None if colour is None else f"{colour} {form}")
    return found


def answer_of(record: PreferenceRecord) -> str:
    """From the question's words and the picture's pixels alone."""
    cells, words = seen(record.images[0].open()), record.prompt[0]["content"].split()
    if "many" in words:
        colour, forms = words[words.index("many") + 1 :][:2]
        return f"there are {NUMBERS[cells.count(f'{colour} {forms[:-1]}')]} {colour} {forms} ."
    place = cells.index(" ".join(words[words.index("the") + 1 :][:2]))
    assert place % CELLS_A_SIDE
    return f"it is a {cells[place - 1]} ."


@pytest.fixture(scope="module")
def records() -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    return shapes_records(300, 60, 0)


def test_chosen_is_what_the_pixels_show_and_rejected_is_not(records) -> None:
    kinds = set()
    for record in (*records[0], *records[1]):
        right = answer_of(record)
        rejected = record.rejected[0]["content"]
        assert record.chosen[0]["content"] == right != rejected
        assert len(right.split()) == len(rejected.split())
        assert set(f"{record.prompt[0]['content'][1:]} {right} {rejected}".split()) <= set(WORDS)
        kinds.add(right.split()[0])
    assert kinds == {"there", "it"}


def test_a_scene_by_hand() -> None:
    """Two red squares, of which one is left of the only blue circle."""
    red, blue = Thing("red", "square"), Thing("blue", "circle")
    cells = (red, blue, None, red, None, None, None, None, None)
    many = Scene(cells, red, counts=True)
    assert many.question() == "how many red squares ?"
    assert many.answer() == many.usual_guess() == "there are two red squares ."
    assert [miss.split()[2] for miss in many.near_misses()] == ["zero", "one", "three", "four"]
    left = Scene(cells, blue, counts=False)
    assert left.question() == "what is left of the blue circle ?"
    assert (left.answer(), left.usual_guess()) == ("it is a red square .", "it is a blue square .")
    assert [miss[8:-2] for miss in left.near_misses()] == ["red circle", "green square", "blue square"]
    # A usual guess that is right is never drawn as the wrong answer.
    assert many.answer() not in {many.draw_wrong(random.Random(seed)) for seed in range(50)}


def test_the_same_seed_gives_the_same_bytes_and_sets_are_disjoint(records) -> None:
    again = shapes_records(10, 60, 0)
    assert again[0] == records[0][:10]
    assert again[1] == records[1]
    assert shapes_records(10, 60, 1)[1] != records[1]
    train, held_out = (
        {(record.prompt[0]["content"], record.images[0].identity) for record in part} for part in records
    )
    assert (len(train), len(held_out)) == (300, 60)
    assert train.isdisjoint(held_out)
