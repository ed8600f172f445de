"""HTML pages that need no network: one base, one style sheet, one macro for tables; all text is escaped.

Templates lie beside the code that fills them: rcpo/ROOM/NAME.html.j2 extends common/page.html.j2.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

import rcpo

PACKAGE = Path(rcpo.__file__).parent


class TableCell(NamedTuple):
    """A cell of a table, or a head."""

    text: str
    kind: str = ""
    """Its CSS classes: left, text, up, down, reason."""
    num_rows: int = 1


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PACKAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["breakable"] = breakable
    return made


def render(template: str, policy: str, **values: object) -> str:
    """The page of ROOM/NAME.html.j2 with these values; `policy` is its content security policy, written in
    code."""
    style = Markup((PACKAGE / "common" / "page.css").read_text(encoding="utf-8"))
    return _environment().get_template(template).render(style=style, policy=Markup(policy), **values)


def breakable(key: str) -> Markup:
    """A dotted key that may go on in a new line behind a dot."""
    return Markup(str(Markup.escape(key)).replace(".", ".<wbr>").replace("_", "_<wbr>"))
