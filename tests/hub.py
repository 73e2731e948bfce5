"""A local stand-in for the hub: models in memory, spoken to by huggingface_hub itself over HTTP."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0" * 40


class Hub:
    """Models by name, each with its files; `posts` lists the paths of all POST requests."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.posts: list[str] = []
        self.fetched: list[str] = []


def _handler(hub: Hub, user: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: object, status: int = 200) -> None:
            self._answer(json.dumps(value).encode(), status, Content_Type="application/json")

        def _content(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _model(self, path: str) -> dict[str, bytes]:
            return hub.models["/".join(path.removeprefix("/api/models/").split("/")[:2])]

        def do_POST(self) -> None:
            path, content = urlsplit(self.path).path, self._content()
            hub.posts.append(path)
            if path == "/api/repos/create":
                given = json.loads(content)
                name = f"{given['organization'] if given.get('organization') else user}/{given['name']}"
                hub.models.setdefault(name, {})
                self._json({"url": f"{constants.ENDPOINT}/{name}", "id": name})
            elif "/preupload/" in path:
                files = json.loads(content)["files"]
                self._json(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
                )
            elif "/commit/" in path:
                for line in filter(None, content.decode().splitlines()):
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        self._model(path)[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
                self._json(
                    {"success": True, "commitUrl": f"{constants.ENDPOINT}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
                )
            else:
                self._json({"errors": [], "warnings": []})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path == "/api/whoami-v2":
                if self.headers.get("Authorization") is None:
                    self._json({"error": "Invalid username or password."}, 401)
                else:
                    self._json({"type": "user", "name": user, "orgs": []})
            elif path.startswith("/api/models/") and "/tree/" in path:
                files = self._model(path)
                self._json([{"type": "file", "path": n, "size": len(b), "oid": _oid(b)} for n, b in files.items()])
            elif path.startswith("/api/models/"):
                name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
                if name not in hub.models:
                    self._answer(b"{}", 404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
                    return
                siblings = [{"rfilename": file} for file in hub.models[name]]
                self._json({"id": name, "sha": COMMIT, "siblings": siblings})
            else:
                self._file(path)

        do_HEAD = do_GET

        def _file(self, path: str) -> None:
            name, _, rest = path[1:].partition("/resolve/")
            file = rest.partition("/")[2]
            body = hub.models.get(name, {}).get(file)
            if body is None:
                self._answer(b"", 404, X_Error_Code="EntryNotFound")
                return
            if self.command == "GET":
                hub.fetched.append(file)
            self._answer(body, ETag=f'"{_oid(body)}"', X_Repo_Commit=COMMIT)

    return Handler


def _oid(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextmanager
def stand_in(monkeypatch: pytest.MonkeyPatch, cache: Path, user: str = "someone") -> Iterator[Hub]:
    """Serve an empty hub on this machine to huggingface_hub, with a cache of its own and a logged-in user."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, user))
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
