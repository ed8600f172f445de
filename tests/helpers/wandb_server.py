"""A small stand-in for W&B's server on this machine: it answers the queries that W&B's own client sends for
reading runs and for saving pages, from run folders. The client, its service and HTTP are the real ones.

What W&B really answers is not known from this; the shapes are those that wandb 0.31 reads.
"""

import base64
import gzip
import io
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from helpers.wandb_records import by_step
from rcpo.monitor.summary import summarize
from rcpo.monitor.wandb_media import PAIRS, PAIRS_COLUMNS
from rcpo.runs.folder import RunFolder
from rcpo.runs.rows import encode_row

KEY = "0123456789abcdef" * 2 + "deadbeef"
STATES = {"done": "finished", "failed": "failed"}


@dataclass
class StoredRun:
    """What W&B has of a run."""

    id: str
    group: str | None
    state: str
    config: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    is_exported: bool = False
    """Whether the history is a parquet file, as W&B makes it of older runs, or rows."""

    def node(self) -> dict[str, Any]:
        when, config = "2026-01-01T00:00:00Z", {key: {"value": value} for key, value in self.config.items()}
        return {
            "projectId": "1", "id": f"id-{self.id}", "name": self.id, "displayName": self.id,
            "state": self.state, "group": self.group, "config": json.dumps(config),
            "summaryMetrics": json.dumps(self.summary), "systemMetrics": "{}", "createdAt": when,
            "heartbeatAt": when, "historyLineCount": len(self.history), "tags": [], "sweepName": None,
            "jobType": None, "commit": None, "readOnly": True, "description": "", "notes": None,
            "user": {"name": "u", "username": "u"}, "historyKeys": {"lastStep": self.last_step},
        }  # fmt: skip

    def parquet(self) -> bytes:
        """The history with a column for each key; null where a row has none."""
        rows = [json.loads(row) for row in self.history]
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [row.get(name) for row in rows] for name in names}
        typed = {
            name: values if name == "_step" else [None if v is None else float(v) for v in values]
            for name, values in columns.items()
        }
        stream = io.BytesIO()
        pq.write_table(pa.table(typed), stream)
        return stream.getvalue()

    @property
    def last_step(self) -> int:
        return max((json.loads(row)["_step"] for row in self.history), default=-1)


def stored(path: Path, group: str | None = None, **changes: Any) -> StoredRun:
    """A run folder as `rcpo.monitor.tracking` sends it (`test_tracking` shows that it does)."""
    run = RunFolder(path)
    summary = summarize(run.rows(run.metrics), run.rows(run.eval))
    start, end = run.load_pair_results(0), run.load_pair_results(summary["end_step"])
    columns = ((end.z_w - start.z_w), (end.z_l - start.z_l), start.z_w, start.z_l)
    rows = zip(range(len(start.z_w)), *(column.tolist() for column in columns), strict=True)
    table = {"columns": list(PAIRS_COLUMNS), "data": [list(row) for row in rows]}
    file = f"media/table/{PAIRS}.table.json"
    named = {f"summary/{key}": value for key, value in summary.items() if value is not None}
    spelt = {'"inf"': '"Infinity"', '"-inf"': '"-Infinity"', "null": '"NaN"'}
    history = []
    for step, row in sorted(by_step(run).items()):
        line = encode_row(row | {"_step": step, "_timestamp": 1.5})
        history.append(re.sub("|".join(spelt), lambda found: spelt[found.group()], line))
    return StoredRun(
        id=path.name,
        group=group,
        state=STATES[run.read_run()["status"]],
        config=yaml.safe_load(run.config.read_text()),
        summary=named | {PAIRS: {"_type": "table-file", "path": file, "nrows": len(start.z_w)}},
        history=history,
        files={file: json.dumps(table)},
    )


class Server:
    """Of the one project `team/grid`."""

    def __init__(self, runs: list[StoredRun]) -> None:
        self.runs = {run.id: run for run in runs}
        self.saved: list[dict[str, Any]] = []
        """Variables of every page that was saved."""
        self.views: dict[str, dict[str, Any]] = {}
        """The pages as they are now, by id."""
        self.base = ""

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else ""
        if "viewer" in query:
            teams = {"edges": [{"node": {"name": "team"}}]}
            viewer = {
                "id": "u",
                "username": "u",
                "entity": "team",
                "email": "",
                "flags": "{}",
                "teams": teams,
            }
            return {"viewer": viewer}
        if "upsertView" in query:
            self.saved.append(variables)
            return {"upsertView": {"view": self._keep(variables), "inserted": not variables.get("id")}}
        if name == "SpecificReport":
            return {"view": self.views.get(variables["reportId"])}
        if variables.get("project", variables.get("projectName", "grid")) != "grid":
            return {"project": None}
        answers = {
            "Runs": self._list, "RunHistoryKeys": self._keys, "RunParquetHistory": self._parts,
            "HistoryPage": self._page, "RunFiles": self._file, "View": self._named,
        }  # fmt: skip
        return answers.get(name, self._project)(variables)

    def _named(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [view for view in self.views.values() if view["name"] == variables["viewName"]]
        return {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}

    def _keep(self, variables: dict[str, Any]) -> dict[str, Any]:
        """A new page, or one in place of that with the id, which W&B writes in base64."""
        known = variables.get("id") or base64.b64encode(f"View:{len(self.views)}".encode()).decode()
        self.views[known] = {**self._view(variables), "id": known}
        return self.views[known]

    def _view(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "1", "name": variables["projectName"], "entityName": variables["entityName"]}
        return {
            "type": variables["type"], "name": variables["name"],
            "displayName": variables["displayName"], "description": variables["description"],
            "spec": variables["spec"], "project": project, "user": None, "createdAt": None, "updatedAt": None,
        }  # fmt: skip

    def _project(self, variables: dict[str, Any]) -> dict[str, Any]:
        node = {"id": "1", "internalId": "1", "name": "grid", "entityName": "team", "createdAt": "2026",
                "isBenchmark": False, "user": None}  # fmt: skip
        page = {"endCursor": "c", "hasNextPage": False}
        return {"project": node, "models": {"edges": [{"node": node, "cursor": "c"}], "pageInfo": page}}

    def _list(self, variables: dict[str, Any]) -> dict[str, Any]:
        group = json.loads(variables["filters"]).get("group")
        nodes = [run.node() for run in self.runs.values() if group is None or run.group == group]
        edges = [{"node": node, "cursor": node["name"]} for node in nodes]
        page = {"endCursor": "c", "hasNextPage": False}
        runs = {"edges": edges, "pageInfo": page}
        return {"project": {"internalId": "1", "runCount": len(nodes), "readOnly": True, "runs": runs}}

    def _keys(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"historyKeys": {"lastStep": self.runs[variables["name"]].last_step}}}}

    def _parts(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["runName"]
        if self.runs[name].is_exported:
            parts = {"parquetUrls": [f"{self.base}/history/{name}/0.parquet"], "liveData": []}
        else:
            parts = {"parquetUrls": [], "liveData": [{"_step": 0}]}
        return {"project": {"run": {"parquetHistory": parts}}}

    def _page(self, variables: dict[str, Any]) -> dict[str, Any]:
        rows = [
            row for row in self.runs[variables["run"]].history
            if variables["minStep"] <= json.loads(row)["_step"] < variables["maxStep"]
        ]  # fmt: skip
        return {"project": {"run": {"history": rows}}}

    def _file(self, variables: dict[str, Any]) -> dict[str, Any]:
        (name,) = variables["fileNames"]
        url = f"{self.base}/files/{variables['name']}/{name}"
        node = {"id": "f", "name": name, "url": url, "directUrl": url, "mimetype": "application/json",
                "sizeBytes": 1, "updatedAt": None, "md5": ""}  # fmt: skip
        page = {"endCursor": "c", "hasNextPage": False}
        files = {"edges": [{"node": node, "cursor": "c"}], "pageInfo": page}
        return {"project": {"internalId": "1", "run": {"fileCount": 1, "files": files}}}

    def file(self, path: str) -> bytes:
        _, kind, run, name = path.split("/", 3)
        return self.runs[run].parquet() if kind == "history" else self.runs[run].files[name].encode()


@contextmanager
def serve(server: Server) -> Iterator[str]:
    """Its address, while it answers."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(server.file(self.path), "application/octet-stream")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/graphql":  # usage statistics of W&B's client
                self.send_error(404)
                return
            asked = json.loads(gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body)
            answer = {"data": server.answer(asked["query"], asked.get("variables") or {})}
            self.reply(json.dumps(answer).encode(), "application/json")

        def reply(self, content: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hangs up is none."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    http = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    server.base = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server.base
    finally:
        http.shutdown()
        http.server_close()
