"""A judge that speaks the OpenAI chat API: which of two answers is better, in both orders.

Owns what it is asked and how its replies are read. `chat.py` asks."""

import re
from collections.abc import Callable, Sequence

from rcpo.evaluation.answer_files import Duel
from rcpo.evaluation.chat import Chat, ChatSettings, Cost

SYSTEM = """\
You compare two answers to the same request. Judge which of them serves the person better: correct, on the
point, honest, clear. Neither length nor the order in which you see them counts. Reply with one of
[[1]] (the first is better), [[2]] (the second is better), [[tie]], and nothing else."""
_VERDICT = re.compile(r"\[\[\s*(1|2|tie)\s*\]\]", re.IGNORECASE)
_BARE = re.compile(r"\W*(1|2|tie)\W*", re.IGNORECASE)
FIRST, SECOND, TIE = "1", "2", "tie"


def verdict_of(reply: str) -> str | None:
    """`FIRST`, `SECOND` or `TIE`: the last of the words in double brackets, or all that was said; None where
    it cannot be read."""
    marked = _VERDICT.findall(reply)
    if marked:
        return str(marked[-1]).lower()
    bare = _BARE.fullmatch(reply)
    return None if bare is None else bare[1].lower()


def messages_of(duel: Duel, is_swapped: bool) -> list[dict[str, str]]:
    """What the judge is asked; swapped: B's answer is the first."""
    first, second = (duel.b, duel.a) if is_swapped else (duel.a, duel.b)
    asked = "\n\n".join(f"<{turn['role']}>\n{turn['content']}\n</{turn['role']}>" for turn in duel.prompt)
    text = f"{asked}\n\n<first>\n{first}\n</first>\n\n<second>\n{second}\n</second>"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


class Judge:
    """Asks about each pair of answers in both orders."""

    def __init__(self, settings: ChatSettings, duels: Sequence[Duel]) -> None:
        """Raises UserError where the client is not here."""
        # Both orders of a pair of answers, one behind the other.
        self._chat = Chat(
            settings, [messages_of(duel, swapped) for duel in duels for swapped in (False, True)]
        )

    def cost(self) -> Cost:
        return self._chat.cost()

    def ask(self, advance: Callable[[int], None]) -> list[tuple[str | None, str | None]]:
        """Verdicts of all pairs in both orders, the second with B's answer first. Raises UserError where the
        judge cannot be used; replies until then are kept."""
        replies = self._chat.ask(advance)
        read = [verdict_of(reply) for reply in replies]
        self._chat.refuse_unreadable(replies, read)
        return list(zip(read[::2], read[1::2], strict=True))
