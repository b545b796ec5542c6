"""A server that speaks the Hugging Face Hub's protocol on loopback, as far as its library uses it for models."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_loopback"
# Some of the identifiers that the hub knows (its documentation: Licenses, Model cards).
LICENCES = {
    "mit",
    "apache-2.0",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "gpl-3.0",
    "openrail",
    "other",
}
TASKS = {
    "feature-extraction",
    "tabular-classification",
    "time-series-forecasting",
    "image-classification",
}


class Hub(ThreadingHTTPServer):
    """Repositories in memory. `broken` is where the line breaks: ``/lfs/``, of a large file, or ``/commit/``."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.blobs, self.broken, self.log = {}, {}, "", []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def files(self, repo, revision="main"):
        """The content of every file, by path."""
        there = self.repositories[repo]
        return there["commits"][there["refs"].get(revision, revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self, status=200, content=b"", headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status, code, message=""):
        self._answer(
            status,
            {"error": message or code},
            {"X-Error-Code": code, "X-Error-Message": message or code},
        )

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _handle(self):
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.server.log.append((self.command, path))
        if self.server.broken and self.server.broken in path:
            self.rfile.read(100)
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not authorised and not path.startswith("/lfs/"):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        writes = (
            self.command in ("POST", "PUT")
            and path != "/api/validate-yaml"
            and not path.startswith("/lfs/")
        )
        if writes and not authorised:
            return self._refuse(401, "", "Invalid username or password.")
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return action(self, body, parse_qs(address.query), **match.groupdict())
        return self._refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _repository(self, repo):
        there = self.server.repositories.get(repo)
        if there is None or (
            there["private"] and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            self._refuse(401 if there is None else 404, "RepoNotFound", "Repository not found")
            return None
        return there

    def _commit_of(self, repo, revision):
        there = self._repository(repo)
        if there is None:
            return None, None
        sha = there["refs"].get(revision, revision)
        if sha not in there["commits"]:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None, None
        return there, sha

    def create(self, body, query):
        wanted = json.loads(body)
        repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if repo in self.server.repositories:
            return self._answer(
                409, {"url": f"{self.server.url}/{repo}", "error": "You already created this repo"}
            )
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        self.server.repositories[repo] = {
            "refs": {"main": "0" * 40},
            "commits": {"0" * 40: {}},
            "private": private,
        }
        return self._answer(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": repo})

    def branch(self, body, query, repo, revision):
        there = self._repository(repo)
        if there is None:
            return None
        if revision in there["refs"]:
            return self._answer(409, {"error": "Reference already exists"})
        there["refs"][revision] = there["refs"]["main"]
        return self._answer(200, {})

    def validate(self, body, query):
        """The metadata of a card: its place, YAML, and the fields that the hub checks."""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = [] if match else ["no metadata"]
        if match:
            data = yaml.safe_load(match[1])
            errors += [
                f"{key} must be text"
                for key in ("license", "library_name")
                if not isinstance(data[key], str)
            ]
            allowed = {"license": LICENCES, "pipeline_tag": TASKS}
            errors += [
                f'"{key}" must be one of {sorted(known)}'
                for key, known in allowed.items()
                if data[key] not in known
            ]
            for model in data.get("model-index", []):
                errors += ["model-index without a name"] * ("name" not in model)
                for result in model["results"]:
                    errors += [
                        f"a result lacks {k}"
                        for k in ("task", "dataset", "metrics")
                        if not result.get(k)
                    ]
                    errors += [
                        "a metric lacks type or value"
                        for m in result["metrics"]
                        if not {"type", "value"} <= {*m}
                    ]
        return self._answer(
            400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []}
        )

    def preupload(self, body, query, repo, revision):
        if self._commit_of(repo, revision)[0] is None:
            return None
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        return self._answer(200, {"files": files})

    def batch(self, body, query, repo):
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                **(
                    {}
                    if o["oid"] in self.server.blobs
                    else {"actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
                ),
            }
            for o in json.loads(body)["objects"]
        ]
        return self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body, query, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, "BadDigest")
        self.server.blobs[oid] = body
        return self._answer(200)

    def commit(self, body, query, repo, revision):
        there, sha = self._commit_of(repo, revision)
        if there is None:
            return None
        files = dict(there["commits"][sha])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        sha = hashlib.sha1(body + sha.encode()).hexdigest()
        there["commits"][sha], there["refs"][revision] = files, sha
        url = f"{self.server.url}/{repo}/commit/{sha}"
        return self._answer(200, {"commitUrl": url, "commitOid": sha, "success": True})

    def info(self, body, query, repo, revision="main"):
        there, sha = self._commit_of(repo, revision)
        if there is None:
            return None
        return self._answer(
            200,
            {
                "id": repo,
                "sha": sha,
                "private": there["private"],
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [],
            },
        )

    def tree(self, body, query, repo, revision):
        there, sha = self._commit_of(repo, revision)
        if there is None:
            return None
        return self._answer(
            200,
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for path, content in there["commits"][sha].items()
            ],
        )

    def resolve(self, body, query, repo, revision, path):
        there, sha = self._commit_of(repo, revision)
        if there is None:
            return None
        if path not in there["commits"][sha]:
            return self._refuse(404, "EntryNotFound")
        content = there["commits"][sha][path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._answer(200, content, {"ETag": etag, "X-Repo-Commit": sha})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{_REPO}/branch/(?P<revision>.+)", Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", Handler.store),
    (rf"GET /api/models/{_REPO}", Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
