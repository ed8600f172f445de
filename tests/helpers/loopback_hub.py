"""A small hub on this machine that takes pushed folders: the part of the Hugging Face hub's HTTP API that
huggingface_hub speaks for them, with large files by Git LFS or Xet.

The client and HTTP are the real ones. What the hub really answers is not known from this; the shapes are
those that huggingface_hub 2.4 reads, and of https://huggingface.co/docs/xet.
"""

import base64
import contextlib
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa

TOKEN = "hf_may_write"
"""The one that it knows."""
XET_KEY = "xet-key"


@dataclass
class Repository:
    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class LoopbackHub:
    """What came: requests as (method, path), repositories by their name."""

    url: str = ""
    may_write: bool = True
    """Whether the token is one that may."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Uploaded files of Git LFS and of Xet, by their SHA-256."""
    _xorbs: dict[str, list[bytes]] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        if not self.may_write and method != "GET":
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            page = {"url": f"{self.url}/{name}", "name": name}
            if name in self.repositories:
                return 409, page | {"error": "You already created this model repo"}
            self.repositories[name] = Repository(asked["visibility"] == "private")
            return 200, page
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == found[1]
            self.large[found[1]] = body
            return 200, {}
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                item | {"actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            return 200, {"files": [_mode(item["path"]) for item in json.loads(body)["files"]]}
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        if re.fullmatch(r"/api/models/(.+)/xet-write-token/main", path):
            return 200, {"casUrl": self.url, "accessToken": XET_KEY, "exp": int(time.time()) + 3600}
        if found := re.fullmatch(r"/v1/xorbs/default/(\w{64})", path):
            self._xorbs[found[1]] = chunks_of(body)
            return 200, {"was_inserted": True}
        if path in ("/shards", "/v1/shards"):
            self.large |= files_of_shard(body, self._xorbs)
            return 200, {"result": 1}
        return 404, {"error": f"no {method} {path}"}

    def _commit(self, name: str, lines: list[Any]) -> tuple[int, Any]:
        repository = self.repositories[name]
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                repository.messages.append(value["summary"])
            elif kind == "file":
                assert value["encoding"] == "base64"
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert kind == "lfsFile", line
                assert (value["algo"], value["size"]) == ("sha256", len(self.large[value["oid"]]))
                repository.files[value["path"]] = self.large[value["oid"]]
        commit = f"{len(repository.messages):040x}"
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit}


def chunks_of(xorb: bytes) -> list[bytes]:
    """The chunks of a xorb: each a header of 8 bytes (version, packed size in 3, kind of compression, size in
    3), then its data."""
    chunks, at = [], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        packed, kind = int.from_bytes(xorb[at + 1 : at + 4], "little"), xorb[at + 4]
        size, data = int.from_bytes(xorb[at + 5 : at + 8], "little"), xorb[at + 8 : at + 8 + packed]
        if kind != 0:
            data = pa.decompress(data, size, codec="lz4", asbytes=True)
        if kind == 2:  # every fourth byte, then the next ones
            groups, start = [b""] * 4, 0
            for idx in range(4):
                end = start + (size - idx + 3) // 4
                groups[idx], start = data[start:end], end
            data = bytes(groups[idx % 4][idx // 4] for idx in range(size))
        assert len(data) == size
        chunks.append(data)
        at += 8 + packed
    return chunks


def files_of_shard(shard: bytes, xorbs: dict[str, list[bytes]]) -> dict[str, bytes]:
    """The files that a shard describes, by their SHA-256: entries of 48 bytes after its header."""
    entries = (shard[at : at + 48] for at in range(48, len(shard), 48))
    files = {}
    for header in entries:
        if header[:32] == b"\xff" * 32:
            break
        flags, num_segments = struct.unpack("<II", header[32:40])
        data = b""
        for _ in range(num_segments):
            entry = next(entries)
            first, end = struct.unpack("<II", entry[40:48])
            data += b"".join(xorbs[hash_text(entry[:32])][first:end])
        if flags >> 31:  # one entry of verification for each segment
            for _ in range(num_segments):
                next(entries)
        assert flags >> 30 & 1, "no SHA-256"
        sha256 = hash_text(next(entries)[:32])
        assert hashlib.sha256(data).hexdigest() == sha256
        files[sha256] = data
    return files


def hash_text(hash_bytes: bytes) -> str:
    """Four little-endian integers, in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash_bytes))


def _mode(path: str) -> dict[str, Any]:
    is_large = path.endswith((".safetensors", "tokenizer.json"))
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}


@contextlib.contextmanager
def a_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _take(self) -> None:
            path = self.path.partition("?")[0]
            body = self._body()
            hub.requests.append((self.command, path))
            status, said = 401, {"error": "Invalid username or password."}
            key = XET_KEY if re.match(r"/(v\d|shards)\b", path) else TOKEN
            if path.startswith("/lfs/") or self.headers["Authorization"] == f"Bearer {key}":
                status, said = hub.answer(self.command, path, body)
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _take  # noqa: N815

        def _body(self) -> bytes:
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"] or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
