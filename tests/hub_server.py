"""A small Hub on loopback for the real huggingface_hub: repositories of models in memory, and what may go wrong."""

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_writer": "someone", "hf_reader": None}  # whose the token is; None: it may only read
DROP = "drop"  # the connection ends without an answer
CUT = "cut"  # it ends in the middle of the answer


class Repo:
    def __init__(self, private: bool):
        self.private, self.files, self.commits = private, {}, 0

    @property
    def sha(self) -> str:
        return f"{self.commits:040x}"


class Hub:
    """What it holds, what it was asked, and what it answers wrongly: `faults`, stage -> status, DROP or CUT.

    The stages are create, info, list, preupload, lfs, storage, xet, commit and download.
    """

    def __init__(self):
        self.clear()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # of a connection that was dropped
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: dict[str, int | str] = {}
        self.asked: list[str] = []  # the stages
        self.paths: list[str] = []


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    ROUTES = (
        ("create", "POST", r"/api/repos/create"),
        ("yaml", "POST", r"/api/validate-yaml"),
        ("info", "GET", r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?"),
        ("list", "GET", r"/api/models/([^/]+/[^/]+)/tree/.*"),
        ("preupload", "POST", r"/api/models/([^/]+/[^/]+)/preupload/[^/]+"),
        ("lfs", "POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"),
        ("storage", "PUT", r"/storage/([0-9a-f]+)"),
        ("xet", "GET", r"/api/models/([^/]+/[^/]+)/xet-write-token/.*"),
        ("commit", "POST", r"/api/models/([^/]+/[^/]+)/commit/[^/]+"),
        ("download", "GET", r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)"),
    )
    WRITES = ("create", "preupload", "lfs", "xet", "commit")

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.paths.append(path)
        method = "GET" if self.command == "HEAD" else self.command
        for stage, verb, pattern in self.ROUTES:
            if verb == method and (found := re.fullmatch(pattern, path)):
                self.hub.asked.append(stage)
                return self.act(stage, *found.groups())
        self.hub.asked.append(f"{self.command} {path}")
        self.refuse(404, "no such address")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def act(self, stage: str, *parts: str) -> None:
        fault = self.hub.faults.get(stage)
        if fault == DROP:
            return self.connection.shutdown(socket.SHUT_RDWR)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self.hub.repos.get(parts[0]) if parts else None
        if isinstance(fault, int):
            self.refuse(fault, "as the test wants")
        elif stage in self.WRITES and token not in TOKENS:
            self.refuse(401, "Invalid username or password.")
        elif stage in self.WRITES and TOKENS[token] is None:
            self.refuse(403, "You don't have the rights to create a model under this namespace")
        elif stage in ("create", "yaml", "storage"):
            getattr(self, stage)(*parts)
        elif repo is None or (repo.private and token not in TOKENS):
            self.refuse(401 if token not in TOKENS else 404, "Repository not found", code="RepoNotFound")
        else:
            getattr(self, stage)(repo, *parts)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if name in self.hub.repos:
            return self.refuse(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        self.hub.repos[name] = Repo(asked.get("private") or asked.get("visibility") == "private")
        self.send({"url": f"{self.hub.url}/{name}", "name": name})

    def yaml(self) -> None:
        self.send({"errors": [], "warnings": []})

    def info(self, repo: Repo, name: str) -> None:
        files = [{"rfilename": path} for path in repo.files]
        self.send({"id": name, "sha": repo.sha, "private": repo.private, "siblings": files, "xetEnabled": True})

    def list(self, repo: Repo, name: str) -> None:
        files = [{"type": "file", "path": p, "size": len(b), "oid": git_hash(b)} for p, b in repo.files.items()]
        self.send(files)

    def preupload(self, repo: Repo, name: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send({"files": files})

    def lfs(self, repo: Repo, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        uploads = [{"upload": {"href": f"{self.hub.url}/storage/{one['oid']}?X-Signature=signed"}} for one in objects]
        self.send({"objects": [one | {"actions": upload} for one, upload in zip(objects, uploads, strict=True)]})

    def storage(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.stored[oid] = self.body
        self.send({})

    def xet(self, repo: Repo, name: str) -> None:
        """Where nothing listens: of the storage itself only the failing is tried."""
        told = {"accessToken": "xet", "casUrl": "http://127.0.0.1:9", "exp": 4102444800}
        names = ("X-Xet-Access-Token", "X-Xet-Cas-Url", "X-Xet-Token-Expiration")
        headers = {name: str(value) for name, value in zip(names, told.values(), strict=True)}
        self.send_bytes(json.dumps(told).encode(), headers)

    def commit(self, repo: Repo, name: str) -> None:
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        repo.commits += 1
        self.send({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def download(self, repo: Repo, name: str, path: str) -> None:
        if path not in repo.files:
            return self.refuse(404, "Entry not found", code="EntryNotFound")
        self.send_bytes(repo.files[path], {"X-Repo-Commit": repo.sha, "ETag": f'"{git_hash(repo.files[path])}"'})

    def send(self, value) -> None:
        self.send_bytes(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, code: str | None = None, **more) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send_bytes(json.dumps({"error": message} | more).encode(), headers, status)

    def send_bytes(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items() | {"Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            is_cut = self.hub.faults.get(self.hub.asked[-1]) == CUT
            self.wfile.write(content[: len(content) // 2] if is_cut else content)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


HUB = Hub()  # started before huggingface_hub is imported, which then reads where the Hub is
