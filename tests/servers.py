"""Real HTTP servers on loopback: one serves files, badly on demand; two speak the Hub's and ModelScope's protocols."""

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


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
    """Serves bytes with ranges. `break_after` closes the connection after so many bytes, once.

    `refusals` are statuses with headers, each used up by one request.
    """

    def __init__(self):
        super().__init__(_Files)
        self.files, self.asked, self.break_after, self.refusals = {}, [], None, []

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
        if owner.refusals:
            status, headers = owner.refusals.pop(0)
            return self.answer(status, **headers)
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
        kind = "text/html" if self.path.endswith("/") else "application/octet-stream"
        return self.answer(206 if start else 200, body[start:], Content_Type=kind)

    do_HEAD = do_GET  # noqa: N815 - the name http.server looks for


COMMIT = "1" * 40
LARGE = (".safetensors", ".png")  # what goes through binary storage
CUT = 0  # a fault that is no status: the connection is closed in the middle


class Repository(Server):
    """One repository on a site: what was uploaded, created and tagged, by which tokens; and faults on demand.

    `faults` holds (part of a path, status or CUT, headers); each is used up by the first request it fits.
    """

    def __init__(self, handler, may_write=True):
        super().__init__(handler)
        self.may_write, self.uploaded, self.tokens = may_write, {}, set()
        self.known, self.objects, self.tags, self.created, self.faults = None, {}, {}, [], []
        self.turn = threading.Lock()
        self.stored = []  # the binaries that were sent, in order

    def fault(self, part, status, times=1, **headers):
        self.faults += [(part, status, headers)] * times

    def next_fault(self, path):
        """The first fault ordered for this path, used up: its status and headers."""
        with self.turn:
            for i, (part, status, headers) in enumerate(self.faults):
                if part in path:
                    del self.faults[i]
                    return status, headers
        return None


class HubServer(Repository):
    """As much of the Hub as we use: create, auth-check, preupload, LFS batch, commit, tag; and the repository given
    back, as a snapshot.
    """

    def __init__(self, may_write=True):
        super().__init__(_Hub, may_write)
        self.settings, self.runtimes, self.host = [], [], None  # a Space's: what was set, its states, its page

    def oid(self, path):
        """What the Hub calls a file's content: sha256 in binary storage, git's blob id else."""
        body = self.uploaded[path]
        if path.endswith(LARGE):
            return hashlib.sha256(body).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class _Site(Quiet):
    def _stumbles(self):
        """Whether this request was refused or broken off, for its token or as the test ordered."""
        owner = self.server.owner
        token = self.headers.get("Authorization")
        owner.tokens.add(token)
        if fault := owner.next_fault(self.path):
            status, headers = fault
            asked = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(asked if status != CUT else min(100, asked))
            if status != CUT:
                self.answer(status, {"error": f"status {status} as ordered"}, **headers)
                return True
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if owner.known and "/store/" not in self.path and token != f"Bearer {owner.known}":
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(401, {"error": "Invalid username or password."})
            return True
        return False

    def _store(self):
        """A binary that was announced, at the address that the site gave for it."""
        body, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.owner.objects[oid] = body
        self.server.owner.stored.append(oid)
        return self.answer(200)

    def do_PUT(self):
        return None if self._stumbles() else self._store()

    def _action(self, each):
        """Git LFS: nothing to do for what is there, else where to send it."""
        owner = self.server.owner
        if each["oid"] in owner.objects:
            return each
        return each | {"actions": {"upload": {"href": f"{owner.address}/store/{each['oid']}"}}}


class _Hub(_Site):
    def do_GET(self):
        if self._stumbles():
            return None
        if "/auth-check" in self.path:
            may = self.server.owner.may_write or not self.path.endswith("write")
            return self.answer(200, {}) if may else self.answer(403, {"error": "read only"})
        if "/resolve/" in self.path:
            return self._resolve(self.path.rsplit("/", 1)[1])
        if self.path.endswith("/runtime"):
            states = self.server.owner.runtimes
            return self.answer(200, states.pop(0) if len(states) > 1 else states[0])
        if not self.path.startswith(("/api/models/fan/pocket", "/api/spaces/fan/page")):
            return self.answer(404, {"error": "none"}, X_Error_Code="RepoNotFound", X_Error_Message="none")
        held = self.server.owner.uploaded
        if "/tree/" in self.path:
            return self.answer(
                200, [{"type": "file", "path": name, "size": len(body), "oid": "0"} for name, body in held.items()]
            )
        files = [{"rfilename": name} for name in held]
        found = {"id": self.path.split("/", 3)[3], "sha": COMMIT, "siblings": files, "private": False}
        return self.answer(200, found | {"host": self.server.owner.host})

    def _resolve(self, name):
        body = self.server.owner.uploaded[name]
        sha = hashlib.sha256(body).hexdigest()
        return self.answer(200, body, ETag=f'"{sha}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815 - the name http.server looks for

    def do_POST(self):
        if self._stumbles():
            return None
        owner, body = self.server.owner, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            owner.created.append(json.loads(body))
            return self.answer(200, {"url": f"{owner.address}/fan/pocket", "name": "fan/pocket"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            return self.answer(200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self.answer(200, {"objects": [self._action(each) for each in json.loads(body)["objects"]]})
        if self.path.endswith(("/secrets", "/variables", "/hardware")):
            owner.settings.append((self.path.rsplit("/", 1)[1], json.loads(body)))
            return self.answer(200, {"stage": "BUILDING"} if self.path.endswith("hardware") else {})
        if "/tag/" in self.path:
            owner.tags[json.loads(body)["tag"]] = self.path.rsplit("/", 1)[1]
            return self.answer(200, {})
        if "/commit/" in self.path:
            return self._commit(body)
        return self.answer(404, {"error": self.path})

    def _mode(self, path):
        owner = self.server.owner
        mode = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
        return mode | ({"oid": owner.oid(path)} if path in owner.uploaded else {})

    def _commit(self, body):
        owner = self.server.owner
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                owner.uploaded[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                owner.uploaded[value["path"]] = owner.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del owner.uploaded[value["path"]]
        asked = f"{owner.address}/fan/pocket/discussions/1" if "create_pr=1" in self.path else None
        done = {"commitUrl": f"{owner.address}/fan/pocket/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        self.answer(200, done | {"pullRequestUrl": asked})


class ModelScopeServer(Repository):
    """As much of ModelScope as we use: who I am, create, list, LFS batch, commit, revisions, tag, download.

    `tags` holds the files as they were when the tag was made. A repository that is `private` is read with its token
    only; without a commit it has no list of files, and `may_write` is asked where files are announced and committed.
    """

    def __init__(self):
        super().__init__(_ModelScope)
        self.exists, self.private, self.commits = False, False, []

    def files(self, revision):
        """The files of a branch or tag; None where there is none."""
        return (self.uploaded or None) if revision == "master" else self.tags.get(revision)


API = "/api/v1"
MODEL = f"{API}/models/fan/pocket"


class _ModelScope(_Site):
    def do_GET(self):
        if self._stumbles():
            return None
        owner, address = self.server.owner, urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(address.query).items()}
        if address.path in ("/", f"{API}/repos/internalAccelerationInfo"):
            return self.answer(200, {"Data": {}})
        if address.path == "/openapi/v1/users/me":
            return self.answer(200, {"success": True, "data": {"username": "fan"}})
        if not address.path.startswith(f"{MODEL}/") or not owner.exists:
            return self._refuse(404, 10010205001, "模型不存在")
        if owner.private and not self.headers.get("Authorization"):
            return self._refuse(403, 10010205002, "no permission")
        if address.path == f"{MODEL}/revisions":
            tags = [{"Revision": tag} for tag in owner.tags]
            return self._data({"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": tags}})
        held = owner.files(asked["Revision"])
        if held is None:
            return self._refuse(404, 10010205003, "no such revision")
        if address.path == f"{MODEL}/repo/files":
            return self._data({"Files": [self._entry(path, body) for path, body in held.items()]})
        return self.answer(200, held[asked["FilePath"]])

    do_HEAD = do_GET  # noqa: N815 - the name http.server looks for

    def _entry(self, path, body):
        sha = hashlib.sha256(body).hexdigest()
        return {"Path": path, "Name": path, "Type": "blob", "Size": len(body), "Sha256": sha}

    def _data(self, data):
        return self.answer(200, {"Code": 200, "Success": True, "Data": data})

    def _refuse(self, status, code, message):
        return self.answer(status, {"Code": code, "Success": False, "Message": message})

    def do_POST(self):
        if self._stumbles():
            return None
        owner, body = self.server.owner, json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        if self.path == f"{API}/models":
            return self._create(body)
        if not owner.may_write or not owner.exists:
            return self._refuse(403, 10010205002, "no permission")
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._data({"objects": [self._action(each) for each in body["objects"]]})
        if self.path == f"{MODEL}/repo/tag":
            if body["TagName"] in owner.tags:
                return self._refuse(400, 10010205004, "tag already exists")
            owner.tags[body["TagName"]] = dict(owner.files(body["Ref"]))
            return self._data({})
        return self._commit(body)

    def _create(self, body):
        owner = self.server.owner
        if (body["Path"], body["Name"]) != ("fan", "pocket"):
            return self._refuse(403, 10010205002, "no permission for this namespace")
        if owner.exists:
            return self._refuse(400, 10010101001, "该名称已被注册使用，请重新命名")
        owner.exists = True
        owner.created.append(body)
        return self._data(body)

    def _commit(self, body):
        owner = self.server.owner
        assert self.path == f"{API}/repos/models/fan/pocket/commit/master"
        for action in body["actions"]:
            lfs = action["type"] == "lfs"
            owner.uploaded[action["path"]] = (
                owner.objects[action["sha256"]] if lfs else base64.b64decode(action["content"])
            )
        owner.commits.append(body["commit_message"])
        return self._data({"oid": COMMIT})
