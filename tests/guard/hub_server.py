"""A stand-in for the Hugging Face Hub: repositories of models in memory, over HTTP on this host."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

SHA = "c0ffee" + "0" * 34
"""Of every commit."""


class Handler(BaseHTTPRequestHandler):
    """Answers what ``snapshot_download``, ``create_repo`` and ``upload_folder`` ask."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.file(with_body=False)

    def do_GET(self):
        if match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", self.path.split("?")[0]):
            self.json(self.about(match[1]))
        elif match := re.fullmatch(r"/api/models/(.+)/tree/(.+)", self.path.split("?")[0]):
            files = self.server.repos.get(match[1], {})
            rows = [
                dict(type="file", path=name, size=len(data), oid=oid(data))
                for name, data in files.items()
            ]
            self.json(rows)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", self.path.split("?")[0]):
            self.json(self.about(match[1]))
        elif self.path.split("?")[0] == "/api/models":
            wanted = parse_qs(urlsplit(self.path).query).get("filter", [])
            found = [self.about(repo) for repo in self.server.repos]
            self.json([one for one in found if set(wanted) <= set(one["tags"])])
        else:
            self.file(with_body=True)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.tokens.append(self.headers.get("authorization"))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            self.server.created.append(asked)
            self.json({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/.+", self.path):
            files = [
                dict(path=one["path"], uploadMode="regular", shouldIgnore=False)
                for one in json.loads(body)["files"]
            ]
            self.json({"files": files})
        elif self.path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/.+", self.path.split("?")[0]):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    data = base64.b64decode(value["content"])
                    self.server.repos[match[1]][value["path"]] = data
            self.json(
                {
                    "commitUrl": f"{self.server.url}/{match[1]}/commit/{SHA}",
                    "commitOid": SHA,
                    "hookOutput": "",
                    "success": True,
                }
            )
        else:
            self.missing("EntryNotFound")

    def about(self, repo):
        if repo not in self.server.repos:
            return None
        names = [dict(rfilename=name) for name in self.server.repos[repo]]
        tags = tags_of(self.server.repos[repo].get("README.md", b"").decode())
        return dict(id=repo, modelId=repo, sha=SHA, siblings=names, private=False, tags=tags)

    def file(self, *, with_body):
        match = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", self.path.split("?")[0])
        data = match and self.server.repos.get(match[1], {}).get(match[3])
        if data is None:
            self.missing("EntryNotFound" if match else "RepoNotFound")
            return
        self.server.downloads.append(match[3])
        self.send_response(200)
        self.send_header("ETag", f'"{oid(data)}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def json(self, content):
        if content is None:
            self.missing("RepoNotFound")
            return
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def missing(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        """Say nothing."""


def tags_of(card):
    """The tags that the Hub makes of the YAML of a card."""
    tags = re.search(r"^tags: \[(.*)\]$", card, re.M)
    base = re.search(r'^base_model: "(.*)"$', card, re.M)
    found = tags[1].split(", ") if tags else []
    return [*found, *([f"base_model:{base[1]}"] if base else [])]


def oid(data):
    """The digest by which git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def hub():
    """A running stand-in: ``url``, ``repos``, ``created``, ``tokens``, ``downloads``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repos, server.created, server.tokens, server.downloads = {}, [], [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
