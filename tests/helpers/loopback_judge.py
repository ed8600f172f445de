"""A server of the OpenAI chat API on this machine that judges by a rule of its own."""

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[[str, str], str]
"""The reply to two answers, as they are shown."""
Server = contextlib.AbstractContextManager[tuple[str, list[Any]]]
"""Its URL, and the requests that came: (authorization, body)."""


def longer(first: str, second: str) -> str:
    return "[[1]]" if len(first) > len(second) else "[[2]]" if len(first) < len(second) else "[[tie]]"


def judging_by(rule: Rule, status: int = 200, seconds: float = 0.0) -> Server:
    """Of two answers."""

    def reply(text: str) -> str:
        shown = re.search(r"<first>\n(.*)\n</first>\n\n<second>\n(.*)\n</second>", text, re.DOTALL)
        assert shown is not None
        return rule(shown[1], shown[2])

    return _replying(reply, status, seconds)


def labelling_by(rule: Callable[[str], str]) -> Server:
    """Of one answer."""

    def reply(text: str) -> str:
        shown = re.search(r"<answer>\n(.*)\n</answer>", text, re.DOTALL)
        assert shown is not None
        return rule(shown[1])

    return _replying(reply)


@contextlib.contextmanager
def _replying(
    reply: Callable[[str], str], status: int = 200, seconds: float = 0.0
) -> Iterator[tuple[str, list[Any]]]:
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.headers["Authorization"], body))
            time.sleep(seconds)
            message = {"role": "assistant", "content": reply(body["messages"][1]["content"])}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            answer: dict[str, Any] = {"error": {"message": "as the test has it"}}
            if status == 200:
                answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                          "choices": [choice]}  # fmt: skip
            data = json.dumps(answer).encode()
            with contextlib.suppress(OSError):  # who asked may have gone
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
