"""A small server that speaks the part of wandb's HTTP interface that a run uses: it keeps what runs tell it."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """Runs by id: the lines of their history as they came in, and how often each was begun."""

    def __init__(self) -> None:
        self.history: dict[str, dict[int, str]] = {}
        self.config: dict[str, str] = {}
        self.began: list[str] = []
        self.url = ""
        self.lock = threading.Lock()

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The history of a run, in order."""
        return [json.loads(line) for _, line in sorted(self.history[run].items())]

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What wandb's server says to a question or an order."""
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "somebody"}}
        if operation == "RunResumeStatus":
            self.began.append(variables["name"])
            return {"model": {**project, "bucket": self._bucket(variables["name"])}}
        if operation == "UpsertBucket":
            name = variables["name"] or self.began[-1]
            inserted = name not in self.history
            self.history.setdefault(name, {})
            self.config[name] = variables.get("config") or self.config.get(name, "{}")
            bucket = {"id": name, "name": name, "config": self.config[name], "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        if name not in self.history:
            return None
        lines = [line for _, line in sorted(self.history[name].items())]
        counts = {"logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0}
        tails = {"historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "summaryMetrics": "{}"}
        config = {"config": self.config[name], "wandbConfig": json.dumps({"t": 1}), "tags": [], "notes": ""}
        return {"id": name, "name": name, "displayName": name, **counts, **tails, **config}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Lines of a run's files, each at its place."""
        sent = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(sent["content"], sent["offset"]):
            self.history[run][number] = line


class _HTTP(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # A run that has finished closes its connections as it likes.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server on this machine, at `url`, until the end of the block."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            reply: dict[str, Any] = {}
            with server.lock:
                if self.path.endswith("/graphql"):
                    asked = json.loads(data)
                    reply = {"data": server.answer(asked.get("operationName", ""), asked.get("variables") or {})}
                elif self.path.endswith("/file_stream"):
                    server.stream(self.path.split("/")[-2], json.loads(data).get("files") or {})
            body = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *_: object) -> None:
            pass

    http = _HTTP(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
