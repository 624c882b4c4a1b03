"""A small hub on this machine: the endpoints that huggingface_hub asks for models, over repositories in memory."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub:
    """The repositories, each a list of versions; what was asked of it; and who may see what.

    Args:
      token: that private repositories and all writing need.
    """

    def __init__(self, token: str):
        self.token = token
        self.versions: dict[str, list[Files]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.full = False  # takes no more objects
        self.objects: dict[str, bytes] = {}  # LFS: what was uploaded, by its SHA-256
        self.asked: list[str] = []
        self.address = ""

    def publish(self, name: str, files: Files) -> str:
        """Another version; returns its commit."""
        self.versions.setdefault(name, []).append(dict(files))
        return commit_of(name, len(self.versions[name]) - 1)

    def version(self, name: str, revision: str) -> tuple[str, Files] | None:
        """The commit and the files of a branch (main alone) or a commit."""
        commits = [commit_of(name, number) for number in range(len(self.versions[name]))]
        place = len(commits) - 1 if revision == "main" else commits.index(revision) if revision in commits else -1
        return None if place < 0 else (commits[place], self.versions[name][place])


def commit_of(name: str, number: int) -> str:
    return hashlib.sha1(f"{name} {number}".encode()).hexdigest()


def is_large(path: str) -> bool:
    return fnmatch(path, "*.safetensors") or fnmatch(path, "*.png")


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub answers at `hub.address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, kind: str) -> None:
        self.answer(code, {"error": kind}, {"X-Error-Code": kind, "X-Error-Message": kind})

    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def seen(self, name: str, revision: str) -> tuple[str, Files] | None:
        """A version that may be read; None after a refusal."""
        if name not in self.hub.versions or (name in self.hub.private and not self.known()):
            self.refuse(401 if not self.known() else 404, "RepoNotFound")
        elif name in self.hub.gated:
            self.refuse(403, "GatedRepo")
        elif (found := self.hub.version(name, unquote(revision))) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            return found
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            if version := self.seen(*found.groups()):
                self.answer(200, [self.listed(name, content) for name, content in version[1].items()])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if version := self.seen(found[1], found[2] or "main"):
                names = [{"rfilename": name} for name in version[1]]
                self.answer(200, {"id": found[1], "sha": version[0], "siblings": names, "tags": [], "private": False})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if version := self.seen(found[1], found[2]):
                self.file(*version, unquote(found[3]))
        else:
            self.refuse(404, f"no such endpoint: {self.command} {path}")

    def file(self, commit: str, files: Files, name: str) -> None:
        if name not in files:
            self.refuse(404, "EntryNotFound")
            return
        etag = hashlib.sha256(files[name]).hexdigest()
        self.answer(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def listed(self, name: str, content: bytes) -> dict[str, Any]:
        found = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if is_large(name):
            digest = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 100}
        return found

    def do_PUT(self) -> None:
        content = self.body()
        digest = urlsplit(self.path).path.rpartition("/")[2]
        if self.hub.full or hashlib.sha256(content).hexdigest() != digest:
            self.refuse(400, "full, or not what was announced")
            return
        self.hub.objects[digest] = content
        self.answer(200)

    def do_POST(self) -> None:
        path, content = urlsplit(self.path).path, self.body()
        self.hub.asked.append(f"POST {path}")
        if path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif not self.known():
            self.refuse(401, "who are you?")
        elif path == "/api/repos/create":
            self.create(json.loads(content))
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            named = [file["path"] for file in json.loads(content)["files"]]
            modes = {name: "lfs" if is_large(name) else "regular" for name in named}
            self.answer(200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self.batch(json.loads(content))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(found[1], [json.loads(line) for line in content.splitlines()])
        else:
            self.refuse(404, f"no such endpoint: POST {path}")

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.versions
        if not there:
            self.hub.publish(name, {".gitattributes": b""})
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        self.answer(409 if there else 200, {"url": f"{self.hub.address}/{name}", "name": name, "id": name})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for entry in asked["objects"]:
            upload = {"href": f"{self.hub.address}/objects/{entry['oid']}"}
            objects.append({**entry, "actions": {"upload": upload}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.versions[name][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.publish(name, files)
        self.answer(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit})
