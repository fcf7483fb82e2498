"""A stand-in for the hub's HTTP API on this machine: what uploads and downloads of huggingface_hub ask for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Files = dict[str, bytes]


@dataclass
class Repository:
    """Attributes:
    private: whether only requests with the token see it.
    commits: their files and messages, by hash.
    refs: branches and pull requests: the hash at which each stands.
    """

    private: bool = False
    commits: dict[str, tuple[Files, str]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        """The hash of a revision."""
        return revision if revision in self.commits else self.refs.get(revision)

    def commit(self, ref: str, files: Files, message: str) -> str:
        """Add a commit."""
        known = repr((len(self.commits), ref, message)).encode()
        name = hashlib.sha1(known + b"".join(files[key] for key in sorted(files))).hexdigest()
        self.commits[name], self.refs[ref] = (files, message), name
        return name


class Hub(ThreadingHTTPServer):
    """All repositories, the large files, and the token that may write."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str, revision: str = "main") -> Files:
        """What a repository holds."""
        found = self.repositories[name]
        return found.commits[found.at(revision) or ""][0]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append(f"{method} {path}")
        self.may_write = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        owner = r"/(?P<name>[\w.-]+/[\w.-]+)"
        routes = [
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._card),
            ("POST", rf"/api/models{owner}/preupload/(?P<ref>.+)", self._modes),
            ("POST", rf"/api/models{owner}/commit/(?P<ref>.+)", self._commit),
            ("POST", rf"/api/models{owner}/discussions", self._pull_request),
            ("POST", rf"{owner}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/large/(?P<oid>\w+)", self._take),
            ("GET", r"/large/(?P<oid>\w+)", self._give),
            ("HEAD", r"/large/(?P<oid>\w+)", self._give),
            ("GET", rf"/api/models{owner}/tree/(?P<ref>[^/]+)/?(?P<file>.*)", self._tree),
            ("GET", rf"/api/models{owner}/refs", self._refs),
            ("GET", rf"/api/models{owner}(?:/revision/(?P<ref>.+))?", self._info),
            ("GET", rf"{owner}/resolve/(?P<ref>[^/]+)/(?P<file>.+)", self._resolve),
            ("HEAD", rf"{owner}/resolve/(?P<ref>[^/]+)/(?P<file>.+)", self._resolve),
        ]
        for wanted, pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                answer(**{key: value or "" for key, value in match.groupdict().items()})
                return
        self._send(404, {"error": f"no {method} {path}"})

    def _send(self, status: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(data))} | {key.replace("_", "-"): value for key, value in headers.items()}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _seen(self, name: str) -> Repository | None:
        """A repository, where the request may see it; otherwise the answer is given."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.may_write):
            self._send(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def _written(self, name: str) -> Repository | None:
        found = self._seen(name)
        if found is not None and not self.may_write:
            self._send(403, {"error": "You have no right to write here"})
            return None
        return found

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.may_write:
            self._send(401, {"error": "Invalid username or password."})
        elif name in self.server.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        else:
            made = self.server.repositories[name] = Repository(
                asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self._send(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _card(self) -> None:
        """Check the metadata of a card, as far as a composition has them."""
        found = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        known = {"library_name": str, "pipeline_tag": str, "tags": list, "base_model": list, "datasets": list}
        wrong = [key for key, value in found.items() if not isinstance(value, known.get(key, ()))]
        self._send(200, {"errors": [{"message": key} for key in wrong], "warnings": []})

    def _modes(self, name: str, ref: str) -> None:
        if self._written(name) is not None:
            asked = json.loads(self.body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked]
            answers = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(asked, modes, strict=True)
            ]
            self._send(200, {"files": answers})

    def _batch(self, name: str) -> None:
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            | {"actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _take(self, oid: str) -> None:
        self.server.large[oid] = self.body
        self._send(200 if hashlib.sha256(self.body).hexdigest() == oid else 400)

    def _give(self, oid: str) -> None:
        self._send(200, self.server.large[oid], ETag=f'"{oid}"')

    def _pull_request(self, name: str) -> None:
        found = self._written(name)
        if found is not None:
            found.refs["refs/pr/1"] = found.refs["main"]
            self._send(200, {"num": 1, "pullRequest": True})

    def _commit(self, name: str, ref: str) -> None:
        found = self._written(name)
        if found is None:
            return
        if "create_pr" in self.query:
            found.refs["refs/pr/1"] = found.refs[ref]
            ref = "refs/pr/1"
        files, message = dict(found.commits[found.refs.get(ref, found.refs["main"])][0]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        made = found.commit(ref, files, message)
        answer = {"commitUrl": f"{self.server.url}/{name}/commit/{made}", "commitOid": made, "hookOutput": ""}
        if ref == "refs/pr/1":
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/1"
        self._send(200, answer)

    def _at(self, name: str, ref: str) -> tuple[Repository, str] | None:
        found = self._seen(name)
        if found is None:
            return None
        commit = found.at(ref or "main")
        if commit is None:
            self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return None
        return found, commit

    def _info(self, name: str, ref: str) -> None:
        place = self._at(name, ref)
        if place is not None:
            found, commit = place
            siblings = [{"rfilename": path} for path in sorted(found.commits[commit][0])]
            self._send(200, {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})

    def _refs(self, name: str) -> None:
        found = self._seen(name)
        if found is not None:
            branches = [
                {"name": key, "ref": f"refs/heads/{key}", "targetCommit": value}
                for key, value in found.refs.items()
                if not key.startswith("refs/")
            ]
            self._send(200, {"branches": branches, "tags": [], "converts": [], "pullRequests": []})

    def _tree(self, name: str, ref: str, file: str) -> None:
        place = self._at(name, ref)
        if place is not None:
            found, commit = place
            files = {path: data for path, data in found.commits[commit][0].items() if path.startswith(file)}
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in sorted(files.items())
            ]
            self._send(200, entries)

    def _resolve(self, name: str, ref: str, file: str) -> None:
        place = self._at(name, ref)
        if place is None:
            return
        found, commit = place
        data = found.commits[commit][0].get(file)
        known = {"X_Repo_Commit": commit}
        if data is None:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **known)
        elif file.endswith(".safetensors"):
            oid = hashlib.sha256(data).hexdigest()
            linked = {"X_Linked_ETag": f'"{oid}"', "X_Linked_Size": str(len(data))}
            elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # a client follows within one host at once
            self._send(302, Location=f"{elsewhere}/large/{oid}", **linked, **known)
        else:
            self._send(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', **known)


@contextmanager
def hub(token: str = "secret") -> Iterator[Hub]:
    """A running stand-in."""
    server = Hub(token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
