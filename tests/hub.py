"""A stand-in for the Hugging Face hub on loopback: repositories in memory, with the parts of its HTTP API that tasks need."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789" * 4


class Hub:
    """The repositories: ``files[name][path]`` is the contents of a file."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuses = False
        self.url = ""


@contextmanager
def serving():
    """Run a hub inside the ``with`` block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def _reply(self, status: int, body: object = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body = self._body()
            if hub.refuses:
                self._reply(401, {"error": "Invalid username or password."})
                return
            parts = self.path.split("?")[0].strip("/").split("/")
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.files.setdefault(name, {})
                hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
                self._reply(200, {"url": f"{hub.url}/{name}"})
            elif self.path == "/api/validate-yaml":
                self._reply(200, {"errors": [], "warnings": []})
            elif parts[-2] == "preupload":
                listed = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                self._reply(200, {"files": listed})
            elif parts[-2] == "commit":
                name = "/".join(parts[2:4])
                files = hub.files[name]
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self._reply(
                    200, {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
                )
            else:
                self._reply(404)

        def do_GET(self) -> None:
            path = self.path.split("?")[0].strip("/")
            parts = path.split("/")
            if not path:
                self._reply(200)
            elif parts[:2] == ["api", "models"]:
                files = hub.files.get("/".join(parts[2:4]))
                if files is None:
                    self._reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                    return
                if parts[4:5] == ["tree"]:
                    tree = [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in files.items()
                    ]
                    self._reply(200, tree)
                    return
                siblings = [{"rfilename": name} for name in files]
                name = "/".join(parts[2:4])
                self._reply(200, {"id": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})
            elif parts[2:3] == ["resolve"]:
                data = hub.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
                if data is None:
                    self._reply(404, b"", X_Error_Code="EntryNotFound")
                    return
                self._reply(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                self._reply(404)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
