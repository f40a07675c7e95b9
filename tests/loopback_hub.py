"""A Hugging Face Hub on 127.0.0.1, for the real clients: huggingface_hub, datasets, diffusers, transformers.

    with LoopbackHub() as hub:
        hub.fault("429", times=2, path="/commit/")
        subprocess.run(command, env=os.environ | hub.environment())
        assert len(hub.commits("datasets/me/flowers")) == 2

Repositories go by "datasets/me/flowers" or "models/me/flowers". Each commit is kept as a snapshot, so that old revisions
resolve. `hub.token` may write as the user "me" and for the organization "club", `hub.read_token` may only read.
What it does not do: discussions, xet, pages of listings.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".png", ".jpg", ".jpeg", ".webp", ".zip", ".tar")
LFS_BYTES = 1_000_000  # larger files are LFS whatever their name

_REPO = r"(?P<repo>(?:models|datasets|spaces)/[^/]+/[^/]+)"
_FILES = r"(?P<repo>(?:(?:datasets|spaces)/)?[^/]+/[^/]+)"
ROUTES = [  # method, path, name of the method that answers
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/{_REPO}(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", rf"/api/{_REPO}/auth-check(?P<write>/write)?", "auth_check"),
    ("GET", rf"/api/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("POST", rf"/api/{_REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"/api/{_REPO}/branch/(?P<name>.+)", "branch"),
    ("POST", rf"/api/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/{_FILES}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"/{_FILES}\.git/info/lfs/verify", "lfs_verify"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("GET", rf"/{_FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Refusal(Exception):
    """An error status, with the headers from which huggingface_hub makes its exceptions."""

    def __init__(self, status, message, code=None, **body):
        headers = {"X-Error-Message": " ".join(message.split())} | ({"X-Error-Code": code} if code else {})
        self.answer = (status, {"error": message, **body}, headers)


@dataclass
class Fault:
    kind: str  # "429", "500", …: this status; "reset", "lost", "slow", "stalled"
    times: float
    path: str
    method: str
    seconds: float


@dataclass
class Commit:
    id: str
    message: str
    files: dict  # path -> File


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self):
        """Git's name of the blob; of an LFS file git knows the pointer alone."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        blob = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass
class Repo:
    private: bool
    sdk: str | None = None  # of a Space
    commits: list = field(default_factory=list)
    refs: dict = field(default_factory=dict)  # branch or refs/pr/N -> its newest commit
    gated: bool = False  # its conditions were not accepted


def is_lfs(path, size):
    return path.endswith(LFS_SUFFIXES) or size > LFS_BYTES


class LoopbackHub:
    """The state of the Hub and its server; use as a context manager."""

    def __init__(self):
        self.token, self.read_token = "hf_" + "Loopback" * 4, "hf_" + "ReadOnly" * 4
        self.repos, self.lfs = {}, {}  # name -> Repo; SHA-256 -> bytes
        self.requests = []  # (method, path) of each request that arrived
        self.uploads = []  # SHA-256 of each LFS object that was uploaded whole, in order, repetitions included
        self.lock, self.closing, self._faults = threading.RLock(), threading.Event(), []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self):
        """Variables that bring a subprocess's clients here; they are read when huggingface_hub is imported."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip

    def fault(self, kind, *, times=1, path="/", method="", seconds=1.0):
        """Let the next `times` requests whose path contains `path` fail (float("inf"): all of them).

        kind: a status such as "429" (with Retry-After: `seconds`), "500", "401", "412"; "reset": the connection is
        reset when half of the request's body has come; "lost": done, but reset in place of an answer; "slow": answered
        `seconds` later; "stalled": never answered.
        """
        self._faults.append(Fault(kind, times, path, method, seconds))

    def mend(self):
        """Take back all faults."""
        self._faults.clear()

    def commits(self, repo):
        """Commits of a repository, oldest first; the first is its creation."""
        return self.repos[repo].commits

    def files(self, repo):
        """Contents of a repository's head, by path."""
        return {path: file.content for path, file in self.commits(repo)[-1].files.items()}

    def edit(self, repo, changes, message="edited on the Hub"):
        """Commit as a person would in the browser: path -> text or bytes, or None to delete it."""
        with self.lock:
            files = dict(self.commits(repo)[-1].files) if self.commits(repo) else {}
            for path, content in changes.items():
                files.pop(path, None)
                if content is not None:
                    content = content.encode() if isinstance(content, str) else content
                    files[path] = File(content, is_lfs(path, len(content)))
            return self.add_commit(repo, files, message)

    def create(self, repo, private=True, sdk=None):
        self.repos[repo] = Repo(private, sdk)
        self.edit(repo, {".gitattributes": "*.parquet filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")

    def add_commit(self, repo, files, message):
        name = hashlib.sha1(f"{repo} {len(self.repos[repo].commits)} {message} {time.time_ns()}".encode()).hexdigest()
        self.repos[repo].commits.append(Commit(name, message, files))
        return self.repos[repo].commits[-1]

    def take_fault(self, method, path):
        with self.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.path in path and fault.method in method:
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection. Methods named in ROUTES return (status, body, headers) or raise Refusal."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer goes out in two writes; the second would wait 40 ms

    def log_message(self, *_):
        pass

    def serve(self):
        self.url = urlsplit(self.path)
        self.hub.requests.append((self.command, self.url.path))
        fault = self.hub.take_fault(self.command, self.url.path)
        try:
            if fault and fault.kind == "stalled":
                self.hub.closing.wait(60)  # longer than any test; not for ever, lest a broken client hangs the suite
                self.close_connection = True
                return
            if fault and fault.kind == "slow":
                self.hub.closing.wait(fault.seconds)
            length = int(self.headers.get("Content-Length", 0))
            if fault and fault.kind == "reset":
                self.rfile.read(length // 2)
                self.reset()
                return
            self.body = self.rfile.read(length)
            if fault and fault.kind.isdigit():
                answer = Refusal(int(fault.kind), "ordered by the test").answer
                answer[2].update({"Retry-After": f"{fault.seconds:.0f}"} if fault.kind == "429" else {})
            else:
                answer = self.route()
            if fault and fault.kind == "lost":
                self.reset()
            else:
                self.reply(*answer)
        except ConnectionError:  # the client has given up
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def reset(self):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())

    def reply(self, status, body, headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self):
        wanted = "GET" if self.command == "HEAD" else self.command
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, self.url.path)
            if match and method == wanted:
                found = {key: value and unquote(value) for key, value in match.groupdict().items()}
                if name in ("resolve", "lfs_batch", "lfs_verify") and found["repo"].count("/") == 1:
                    found["repo"] = f"models/{found['repo']}"
                try:
                    with self.hub.lock:
                        return getattr(self, name)(**found)
                except Refusal as refusal:
                    return refusal.answer
        return Refusal(404, f"no such page: {self.url.path}").answer

    # --- who may do what ---------------------------------------------------------------------------------------------

    def may_write(self):
        """Whether the token may write; raise where it is wrong, return None where there is none."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", self.hub.token, self.hub.read_token):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token == self.hub.token if token else None

    def check_write(self, namespace):
        may = self.may_write()
        if may is None:
            raise Refusal(401, "Invalid username or password.")
        if not may or namespace not in ("me", "club"):
            raise Refusal(403, f"You don't have the rights to write to the namespace {namespace}")

    def open(self, repo, write=False):
        may = self.may_write()
        if may is None and (repo not in self.hub.repos or self.hub.repos[repo].private):
            raise Refusal(401, "Invalid username or password.")
        if repo not in self.hub.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(repo.split("/")[1])
        return self.hub.repos[repo]

    def commit_of(self, repo, revision):
        commits = self.open(repo).commits
        if revision in (None, "main", "HEAD"):
            return commits[-1]
        refs = self.hub.repos[repo].refs
        if revision in refs:
            return refs[revision]
        for commit in [*commits, *refs.values()]:
            if len(revision) >= 7 and commit.id.startswith(revision):
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    # --- looking -----------------------------------------------------------------------------------------------------

    def whoami(self):
        if self.may_write() is None:
            raise Refusal(401, "Invalid username or password.")
        access = {"displayName": "test", "role": "write" if self.may_write() else "read"}
        user = {"type": "user", "id": "1", "name": "me", "fullname": "Me", "orgs": [{"name": "club"}]}
        return 200, user | {"auth": {"type": "access_token", "accessToken": access}}, {}

    def auth_check(self, repo, write):
        if self.open(repo, bool(write)).gated:
            raise Refusal(403, f"Access to {repo} is restricted", "GatedRepo")
        return 200, {}, {}

    def info(self, repo, revision):
        commit = self.commit_of(repo, revision)
        name = repo.partition("/")[2]
        files = [{"rfilename": path, "size": len(file.content)} for path, file in commit.files.items()]
        gated = "auto" if self.hub.repos[repo].gated else False
        return 200, {"_id": name, "id": name, "author": name.split("/")[0], "sha": commit.id, "siblings": files,
                     "private": self.hub.repos[repo].private, "gated": gated, "disabled": False, "tags": []}, {}  # fmt: skip

    def entry(self, commit, path):
        file = commit.files.get(path)
        if file is None:
            return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
        entry = {"type": "file", "oid": file.oid, "size": len(file.content), "path": path}
        last = {"lastCommit": {"id": commit.id, "title": commit.message, "date": "2026-01-01T00:00:00.000Z"}}
        lfs = {"lfs": {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}} if file.lfs else {}
        return entry | last | lfs

    def tree(self, repo, revision, folder):
        commit = self.commit_of(repo, revision)
        root = PurePosixPath(folder or ".")
        below = {path for name in commit.files for path in [PurePosixPath(name), *PurePosixPath(name).parents]}
        below = sorted(path for path in below if root in path.parents)
        if folder and not below:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = parse_qs(self.url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
        return 200, [self.entry(commit, str(path)) for path in below if recursive or path.parent == root], {}

    def paths_info(self, repo, revision):
        commit = self.commit_of(repo, revision)
        paths = [path.strip("/") for path in parse_qs(self.body.decode()).get("paths", [])]
        known = set(commit.files) | {str(parent) for name in commit.files for parent in PurePosixPath(name).parents}
        return 200, [self.entry(commit, path) for path in paths if path in known], {}

    def resolve(self, repo, revision, path):
        commit = self.commit_of(repo, revision)
        if path not in commit.files:
            raise Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        file = commit.files[path]
        size, tag = len(file.content), f'"{file.sha256 if file.lfs else file.oid}"'
        headers = {"X-Repo-Commit": commit.id, "ETag": tag, "Content-Type": "application/octet-stream"}
        headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(size)} if file.lfs else {}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not part:
            return 200, file.content, headers | {"Accept-Ranges": "bytes"}
        start, stop = int(part[1]), min(size, int(part[2] or size) + 1)
        return 206, file.content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}

    # --- changing ----------------------------------------------------------------------------------------------------

    def create(self):
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or "me"
        self.check_write(namespace)
        repo = f"{wanted.get('type', 'model')}s/{namespace}/{wanted['name']}"
        address = f"{self.hub.url}/{repo.removeprefix('models/')}"
        if repo in self.hub.repos:
            raise Refusal(409, "You already created this repo", url=address)
        self.hub.create(repo, wanted.get("visibility") == "private" or bool(wanted.get("private")), wanted.get("sdk"))
        return 200, {"url": address, "name": f"{namespace}/{wanted['name']}"}, {}

    def validate_yaml(self):
        head = re.match(r"---\r?\n(.*?)\r?\n---\s", json.loads(self.body)["content"] + "\n", re.DOTALL)
        if not head:
            return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
        try:
            metadata = yaml.safe_load(head[1])
            error = "" if isinstance(metadata, dict) else "the metadata is no mapping"
        except yaml.YAMLError as problem:
            error = str(problem)
        return 400 if error else 200, {"errors": [{"message": error}] if error else [], "warnings": []}, {}

    def branch(self, repo, name):
        self.open(repo, write=True)
        start = json.loads(self.body or b"{}").get("startingPoint")
        self.hub.repos[repo].refs[name] = self.commit_of(repo, start)
        return 200, {}, {}

    def opens_pr(self):
        return parse_qs(self.url.query).get("create_pr") == ["1"]

    def preupload(self, repo, revision):
        self.open(repo, write=not self.opens_pr())
        files = self.commit_of(repo, revision).files
        answer = []
        for wanted in json.loads(self.body)["files"]:
            path, lfs = wanted["path"], is_lfs(wanted["path"], wanted["size"])
            known = {"oid": files[path].sha256 if files[path].lfs else files[path].oid} if path in files else {}
            answer.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False} | known)
        return 200, {"files": answer}, {}

    def lfs_batch(self, repo):
        self.open(repo, write=True)
        objects = json.loads(self.body)["objects"]
        files = f"{self.hub.url}/{repo.removeprefix('models/')}.git/info/lfs"
        for entry in objects:
            if entry["oid"] not in self.hub.lfs:
                upload = {"href": f"{self.hub.url}/lfs/{entry['oid']}?signature=x"}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{files}/verify"}}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not that of the object")
        self.hub.lfs[oid] = self.body
        self.hub.uploads.append(oid)
        return 200, b"", {"ETag": f'"{oid}"'}

    def lfs_verify(self, repo):
        self.open(repo, write=True)
        wanted = json.loads(self.body)
        if len(self.hub.lfs.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "no such object", "EntryNotFound")
        return 200, {}, {}

    def commit(self, repo, revision):
        self.open(repo, write=not self.opens_pr())
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, head = lines[0]["value"], self.commit_of(repo, revision)
        if header.get("parentCommit") not in (None, head.id):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            path = value["path"]
            if key == "file":
                files[path] = File(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Refusal(400, f"the object of {path} has not been uploaded")
                files[path] = File(self.hub.lfs[value["oid"]], True)
            else:
                gone = (
                    (path,) if key == "deletedFile" else tuple(n for n in files if n.startswith(path.rstrip("/") + "/"))
                )
                kept = {name: file for name, file in files.items() if name not in gone}
                if len(kept) == len(files):
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                files = kept
        refs, pull = self.hub.repos[repo].refs, {}
        main = list(self.hub.commits(repo))
        commit = self.hub.add_commit(repo, files, header["summary"])
        if self.opens_pr():
            number = 1 + sum(name.startswith("refs/pr/") for name in refs)
            revision = f"refs/pr/{number}"
            pull = {"pullRequestUrl": f"{self.hub.url}/{repo.removeprefix('models/')}/discussions/{number}"}
        if revision not in ("main", "HEAD"):
            refs[revision] = commit
            self.hub.repos[repo].commits[:] = main
        address = f"{self.hub.url}/{repo.removeprefix('models/')}/commit/{commit.id}"
        return 200, {"success": True, "commitOid": commit.id, "commitUrl": address, "hookOutput": ""} | pull, {}
