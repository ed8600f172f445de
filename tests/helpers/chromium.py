"""A headless browser for tests: opens a page and says how it went."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Visit:
    """What a browser made of a page."""

    html: str
    """The document after its scripts have run."""
    console: list[str]
    """Everything that was written to the browser's console."""

    def said(self, name: str) -> str:
        """data-NAME of the document element."""
        found = re.search(rf'<html[^>]* data-{name}="([^"]*)"', self.html)
        return found[1] if found else ""


def visit(page: Path, folder: Path, width: int = 1280, picture: Path | None = None) -> Visit:
    """Open `page`; a profile is kept in `folder`. No network: every host is refused."""
    browser = shutil.which("chromium")
    assert browser is not None
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
    ]  # fmt: skip
    command.append("--dump-dom" if picture is None else f"--screenshot={picture}")
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return Visit(done.stdout, console)
