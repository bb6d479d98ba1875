"""The part of the Hugging Face hub's API that its clients use to read, served on the loopback address."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_of_a_reader"
"""The one login that may read gated repositories."""
LARGE = (".safetensors", ".bin", ".parquet", ".model", ".pt")
"""File endings that the hub keeps in large-file storage, behind a redirect."""

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits of one repository; `main` is the last one.

    rate  bytes per second of its large files; None: as fast as it goes
    """

    name: str
    kind: str = "models"
    gated: bool = False
    rate: float | None = None
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, files: Files) -> str:
        """Move `main` on; the id of the new commit."""
        digest = hashlib.sha1(f"{self.name} {len(self.commits)}".encode())
        for name in sorted(files):
            digest.update(name.encode() + hashlib.sha256(files[name]).digest())
        self.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> Files:
        return self.commits[self.main]

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a commit id means."""
        return self.main if revision == "main" else revision if revision in self.commits else None


class Hub:
    """Repositories behind an HTTP server; `requests` holds what was asked: "GET /api/models/…"."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        handler = type("OfThisHub", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, name="hub", daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, files: Files, kind: str = "models", **more) -> Repository:
        repository = self.repositories[kind, name] = Repository(name, kind, **more)
        repository.commit(files)
        return repository

    def __getitem__(self, name: str) -> Repository:
        return next(repository for (_, known), repository in self.repositories.items() if known == name)

    @contextmanager
    def watched(self) -> Iterator[list[str]]:
        """The requests of a block, complete when it ends."""
        start, asked = len(self.requests), []
        yield asked
        asked += self.requests[start:]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Refusal(Exception):
    """An error in the hub's way: a status, and its code and message as headers."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}
        super().__init__(message)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # connections stay open

    def log_message(self, *_) -> None:
        """Requests are kept in `Hub.requests`, not printed."""

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {unquote(self.path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            for pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match:
                    parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    getattr(self, name)(**parts, query=query, body=body)
                    return
            raise Refusal(404, "NotFound", "Sorry, we can't find the page you are looking for.")
        except Refusal as refusal:
            self.answer_json({"error": str(refusal)}, refusal.status, **refusal.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has gone

    do_HEAD = do_POST = do_GET

    # Routes ------------------------------------------------------------------------------------------------------

    def info(self, kind: str, repository: str, query: dict, body: bytes, revision: str = "main") -> None:
        found = self.repository(kind, repository)
        sha = self.commit(found, revision)
        files = [{"rfilename": name} for name in sorted(found.commits[sha])]
        date = "2024-01-01T00:00:00.000Z"
        about = {"id": repository, "sha": sha, "private": False, "gated": "manual" if found.gated else False}
        about |= {"siblings": files, "tags": [], "lastModified": date, "createdAt": date, "downloads": 0, "likes": 0}
        self.answer_json(about | ({"modelId": repository} if kind == "models" else {}))

    def tree(self, kind: str, repository: str, revision: str, query: dict, body: bytes, folder: str = "") -> None:
        found = self.repository(kind, repository)
        sha = self.commit(found, revision)
        entries = below(found.commits[sha], folder.strip("/"), query.get("recursive", "").lower() in ("1", "true"))
        if folder and not entries:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision!r}", **{"X-Repo-Commit": sha})
        self.answer_json(entries)

    def paths_info(self, kind: str, repository: str, revision: str, query: dict, body: bytes) -> None:
        found = self.repository(kind, repository)
        everything = below(found.commits[self.commit(found, revision)], "", True)
        form = "json" in (self.headers.get("Content-Type") or "")
        asked = json.loads(body)["paths"] if form else parse_qs(body.decode()).get("paths", [])
        self.answer_json([entry for entry in everything if entry["path"] in asked])

    def whoami(self, query: dict, body: bytes) -> None:
        if not self.reader:
            raise Refusal(401, "", "Invalid username or password.")
        self.answer_json({"type": "user", "name": "reader", "orgs": []})

    def file(self, repository: str, revision: str, name: str, query: dict, body: bytes, dataset: str = "") -> None:
        """A file by its name: large ones are elsewhere, others at their commit, as on the hub."""
        kind = "datasets" if dataset else "models"
        found = self.repository(kind, repository)
        sha = self.commit(found, revision)
        if found.gated and not self.reader:
            message = f"Access to model {repository} is restricted. You must have access to it and be authenticated."
            raise Refusal(401, "GatedRepo", message)
        if name not in found.commits[sha]:
            raise Refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
        content = found.commits[sha][name]
        if name.endswith(LARGE):
            blob = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{blob}"'}
            place = f"{self.hub.endpoint}/cdn/{kind}/{repository}/{sha}/{quote(name)}"
            self.answer(b"", 302, Location=place, **{"X-Repo-Commit": sha}, **linked)
        else:
            place = f"/api/resolve-cache/{kind}/{repository}/{sha}/{quote(name)}"
            self.answer(b"", 307, Location=place, ETag=f'"{git_id(content)}"', **{"X-Repo-Commit": sha})

    def stored(self, kind: str, repository: str, revision: str, name: str, query: dict, body: bytes) -> None:
        found = self.repository(kind, repository)
        content = found.commits[revision][name]
        blob = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_id(content)
        headers = {"X-Repo-Commit": revision, "ETag": f'"{blob}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            self.answer(content, rate=found.rate, **headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start > end:
            raise Refusal(416, "", "Range Not Satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.answer(content[start : end + 1], 206, rate=found.rate, **headers)

    # What they have in common -------------------------------------------------------------------------------------

    @property
    def reader(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get((kind, name))
        if found is None:  # to somebody who is not logged in, private and missing ones look alike
            raise Refusal(404 if self.reader else 401, "RepoNotFound", "Repository not found")
        return found

    def commit(self, repository: Repository, revision: str) -> str:
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def answer_json(self, content: object, status: int = 200, **headers: str) -> None:
        self.answer(json.dumps(content).encode(), status, **{"Content-Type": "application/json"}, **headers)

    def answer(self, content: bytes, status: int = 200, rate: float | None = None, **headers: str) -> None:
        self.send_response(HTTPStatus(status))
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        step = len(content) if rate is None else max(1, int(rate / 10))
        for start in range(0, len(content), max(1, step)):
            self.wfile.write(content[start : start + step])
            if rate is not None:
                time.sleep(0.1)


REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
OF = rf"/(?P<kind>models|datasets)/{REPOSITORY}"
ROUTES = (
    (rf"/api{OF}(/revision/(?P<revision>[^/]+))?", "info"),
    (rf"/api{OF}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
    (rf"/api{OF}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"(/api/resolve-cache|/cdn){OF}/(?P<revision>[^/]+)/(?P<name>.+)", "stored"),
    (rf"/(?P<dataset>datasets/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", "file"),
    (r"/api/whoami-v2", "whoami"),
)
"""Path of a request → method of the handler."""


def git_id(content: bytes) -> str:
    """The id under which git keeps a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def below(files: Files, folder: str, recursive: bool) -> list[dict]:
    """Files and folders in a folder, as the hub lists them."""
    entries: dict[str, dict] = {}
    for path, content in sorted(files.items()):
        parts = path.split("/")
        start = len(folder.split("/")) if folder else 0
        if folder and parts[:start] != folder.split("/"):
            continue
        for end in range(start + 1, len(parts) if recursive else min(start + 2, len(parts))):
            inner = "/".join(parts[:end])
            entries[inner] = {"type": "directory", "path": inner, "oid": git_id(inner.encode()), "size": 0}
        if recursive or len(parts) == start + 1:
            entry = {"type": "file", "path": path, "oid": git_id(content), "size": len(content)}
            if path.endswith(LARGE):
                large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                entry["lfs"] = large
            entries[path] = entry
    return list(entries.values())
