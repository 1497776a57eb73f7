"""Real HTTP servers on loopback: one that serves files, badly on demand, and one that speaks the Hub's protocol."""

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """A threading HTTP server that lives for one test."""

    def __init__(self, handler):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.owner = self
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, dict | list) else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class FileServer(Server):
    """Serves bytes with ranges. `break_after` closes the connection after so many bytes, once."""

    def __init__(self):
        super().__init__(_Files)
        self.files, self.asked, self.break_after = {}, [], None

    def serve(self, name, body):
        self.files[f"/{name}"] = body
        return f"{self.address}/{name}"

    @staticmethod
    def sha256(body):
        return hashlib.sha256(body).hexdigest()


class _Files(Quiet):
    def do_GET(self):
        owner, wanted = self.server.owner, self.headers.get("Range")
        owner.asked.append((self.path, wanted))
        body = owner.files.get(self.path)
        if body is None:
            return self.answer(404)
        start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
        if owner.break_after is not None:
            cut, owner.break_after = owner.break_after, None
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start : start + cut])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self.answer(206 if start else 200, body[start:])

    do_HEAD = do_GET  # noqa: N815 - the name http.server looks for


COMMIT = "1" * 40


class HubServer(Server):
    """As much of the Hub as we use: create, auth-check, preupload, commit; and what was given back, as a snapshot.

    It asks for every file as a regular one: the tiny weights need no binary storage.
    """

    def __init__(self, may_write=True):
        super().__init__(_Hub)
        self.may_write, self.uploaded, self.tokens = may_write, {}, set()


class _Hub(Quiet):
    def do_GET(self):
        self.server.owner.tokens.add(self.headers.get("Authorization"))
        if "/auth-check" in self.path:
            return self.answer(200, {}) if self.server.owner.may_write else self.answer(403, {"error": "read only"})
        if "/resolve/" in self.path:
            return self._resolve(self.path.rsplit("/", 1)[1])
        if not self.path.startswith("/api/models/fan/pocket"):
            return self.answer(404, {"error": "none"}, X_Error_Code="RepoNotFound", X_Error_Message="none")
        held = self.server.owner.uploaded
        if "/tree/" in self.path:
            return self.answer(
                200, [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in held.items()]
            )
        files = [{"rfilename": name} for name in held]
        return self.answer(200, {"id": "fan/pocket", "sha": COMMIT, "siblings": files, "private": False})

    def _resolve(self, name):
        body = self.server.owner.uploaded[name]
        sha = hashlib.sha256(body).hexdigest()
        return self.answer(200, body, ETag=f'"{sha}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815 - the name http.server looks for

    def do_POST(self):
        owner, body = self.server.owner, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{owner.address}/fan/pocket", "name": "fan/pocket"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.answer(200, {"files": modes})
        if "/commit/" in self.path:
            return self._commit(body)
        return self.answer(404, {"error": self.path})

    def _commit(self, body):
        owner = self.server.owner
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                owner.uploaded[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        done = {"commitUrl": f"{owner.address}/fan/pocket/commit/1", "commitOid": COMMIT, "success": True}
        self.answer(200, done | {"pullRequestUrl": None})
