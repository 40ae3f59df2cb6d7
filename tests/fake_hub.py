"""A Hugging Face hub for tests: a cache in the hub's own layout, and a network that answers what a test says."""
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants
from huggingface_hub.utils import set_client_factory
from huggingface_hub.utils._http import default_client_factory, hf_request_event_hook

HTTP = import_module(type(default_client_factory()).__module__.partition(".")[0])  # the client library of the hub
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def contents(files) -> dict[str, Path | bytes]:
    "The files of a folder by name, or the files that are given by name."
    if isinstance(files, Mapping): return dict(files)
    return {path.relative_to(files).as_posix(): path for path in Path(files).rglob("*") if path.is_file()}


def read(content: Path | bytes) -> bytes: return content if isinstance(content, bytes) else content.read_bytes()


def digest(content: Path | bytes) -> str:
    "What the hub names a file by."
    if isinstance(content, bytes): return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file: return hashlib.file_digest(file, "sha256").hexdigest()


def repo_folder(cache: Path, repo: str) -> Path: return cache / f"models--{repo.replace('/', '--')}"


def add_to_cache(cache: Path, repo: str, files, revision: str = "main", commit: str = COMMIT) -> Path:
    "Put a repository into a cache as a download would; the folder of its snapshot."
    folder = repo_folder(cache, repo)
    snapshot, blobs = folder / "snapshots" / commit, folder / "blobs"
    for place in (blobs, folder / "refs", snapshot): place.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    for name, content in contents(files).items():
        blob, link = blobs / digest(content), snapshot / name
        if isinstance(content, bytes): blob.write_bytes(content)
        elif not blob.exists(): os.link(content, blob)  # large files are not copied
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(*[".."] * len(link.relative_to(folder).parent.parts)) / "blobs" / blob.name)
    return snapshot


@dataclass
class FakeHub:
    "The network: repositories that are there, what else is answered, and what was asked."
    repos: dict[str, dict] = field(default_factory=dict)
    answer: Callable | None = None  # request -> a response, an exception, or None for the usual one
    asked: list[str] = field(default_factory=list)

    def __call__(self, request):
        self.asked.append(f"{request.method} {request.url.path}")
        said = self.answer(request) if self.answer else None
        if isinstance(said, Exception): raise said
        return said or self.serve(request)

    def serve(self, request):
        "What the real hub answers, as far as loading goes."
        path = unquote(request.url.path).strip("/")
        for repo, files in self.repos.items():
            if path.startswith(f"{repo}/resolve/"):
                revision, _, name = path.removeprefix(f"{repo}/resolve/").partition("/")
                return self.file(request, files, revision, name)
            if path.startswith(f"api/models/{repo}"): return self.about(path, files)
        return refusal(401, "RepoNotFound")

    def file(self, request, files, revision, name):
        if revision not in ("main", COMMIT): return refusal(404, "RevisionNotFound")
        if name not in files: return refusal(404, "EntryNotFound", {"X-Repo-Commit": COMMIT})
        data = read(files[name])
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT}
        if request.method == "HEAD": return HTTP.Response(200, headers=headers | {"Content-Length": str(len(data))})
        return HTTP.Response(200, headers=headers, content=data)

    def about(self, path, files):
        names = [{"type": "file", "path": name, "size": len(read(data)), "oid": "0" * 40}
                 for name, data in files.items()]
        if "/tree/" in path: return HTTP.Response(200, json=names)
        siblings = [{"rfilename": entry["path"]} for entry in names]
        return HTTP.Response(200, json={"id": path.removeprefix("api/models/"), "sha": COMMIT, "siblings": siblings})


def refusal(status: int, code: str, headers: Mapping = {}):
    "The hub's way to say no."
    return HTTP.Response(status, headers={"X-Error-Code": code, **headers}, json={"error": code})


def no_network(request) -> Exception:
    "What a client meets that cannot reach the hub."
    return HTTP.ConnectError("[Errno -2] Name or service not known", request=request)


def connect(monkeypatch, hub: FakeHub):
    "Let huggingface_hub reach this hub and no other."
    def client():
        return HTTP.Client(transport=HTTP.MockTransport(hub), event_hooks={"request": [hf_request_event_hook]},
                           follow_redirects=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    set_client_factory(client)
    return hub


def disconnect(): set_client_factory(default_client_factory)
