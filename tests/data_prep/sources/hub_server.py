"""A small server that speaks the part of the Hugging Face hub's HTTP interface that streaming a data set uses."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """One data set repository: its files, and how often a download breaks off.

    breaks: downloads that end after `break_after` bytes though more was promised. busy: questions about the repository
    that are answered with 429. commit: the newest one. earlier: files of commits before it. seen: both, counted.
    """

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        self.repository, self.files = repository, files
        self.breaks, self.break_after, self.busy = 0, 0, 0
        self.commit, self.earlier = COMMIT, dict[str, dict[str, bytes]]()
        self.seen: Counter[str] = Counter()
        self.lock = threading.Lock()

    def is_busy(self) -> bool:
        """Whether this question is one of those that are put off; several may be asked at once."""
        with self.lock:
            busy = self.busy > 0
            self.busy -= busy
            self.seen["busy"] += busy
        return busy

    def push(self, commit: str, files: dict[str, bytes]) -> None:
        """A new commit."""
        self.earlier[self.commit] = self.files
        self.commit, self.files = commit, files

    def at(self, revision: str) -> dict[str, bytes]:
        """The files of a commit, or the newest."""
        return self.earlier.get(revision, self.files)

    def entry(self, path: str, revision: str) -> dict:
        data = self.at(revision)[path]
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": path}

    def tree(self, revision: str, folder: str, deep: bool) -> list[dict]:
        """Files and folders below `folder`, all or only the next level."""
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict] = {}
        for path in sorted(self.at(revision)):
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if deep else min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                found[name] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
            if deep or len(parts) == 1:
                found[path] = self.entry(path, revision)
        return list(found.values())

    def info(self, revision: str) -> dict:
        return {
            "_id": "1", "id": self.repository, "author": self.repository.split("/")[0],
            "sha": revision if revision in self.earlier else self.commit,
            "lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z",
            "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "siblings": [{"rfilename": path} for path in self.at(revision)],
        }  # fmt: skip


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """The address of a running server for `hub`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, value: object) -> None:
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            base = f"/api/datasets/{hub.repository}"
            resolved = re.fullmatch(rf"/datasets/{hub.repository}/resolve/([^/]+)/(.+)", path)
            if resolved and resolved[2] in hub.at(resolved[1]):
                self.file(hub.at(resolved[1])[resolved[2]])
            elif path.startswith(base) and hub.is_busy():
                self.reply(429, b"{}", {"Retry-After": "0", "Content-Type": "application/json"})
            elif match := re.fullmatch(rf"{base}(?:/revision/([^/]+))?", path):
                self.json(hub.info(match[1] or ""))
            elif match := re.fullmatch(rf"{base}/tree/([^/]+)(?:/(.*))?", path):
                deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
                self.json(hub.tree(match[1], match[2] or "", deep))
            else:
                body = json.dumps({"error": "Entry not found"}).encode()
                self.reply(404, body, {"X-Error-Code": "EntryNotFound", "Content-Type": "application/json"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(rf"/api/datasets/{hub.repository}/paths-info/([^/]+)", path):
                try:
                    wanted = json.loads(body)["paths"]
                except ValueError:
                    wanted = parse_qs(body.decode()).get("paths", [])
                wanted = [wanted] if isinstance(wanted, str) else wanted
                self.json([hub.entry(name, match[1]) for name in wanted if name in hub.at(match[1])])
            else:
                self.reply(404, b"{}")

        def file(self, data: bytes) -> None:
            headers = {
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            }  # fmt: skip
            status, part = 200, data
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if wanted:
                first = int(wanted[1]) if wanted[1] else len(data) - int(wanted[2])
                last = int(wanted[2]) if wanted[1] and wanted[2] else len(data) - 1
                if first >= len(data):
                    self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                    return
                status, part = 206, data[first : last + 1]
                headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            with hub.lock:
                broken = self.command == "GET" and hub.breaks > 0 and len(part) > hub.break_after
                hub.breaks -= broken
                hub.seen["broken"] += broken
            if not broken:
                self.reply(status, part, headers)
                return
            self.send_response(status)
            for key, value in {"Content-Length": str(len(part)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(part[: hub.break_after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
