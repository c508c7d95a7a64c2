"""`hf:` sources through huggingface_hub itself, against a small hub on this machine."""
from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from shelf import sha

from hanok.bundle.hub import fetch
from hanok.errors import HubError

COMMIT = "c0ffee" + "0" * 34
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(100_000), "pytorch_model.bin": b"a pickle", "train.py": b"code",
         "1_Pooling/config.json": b"{}"}
ERRORS = {"org/closed": (403, "GatedRepo"), "org/none": (404, "RepoNotFound")}


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.server.seen.append(path)
        for name, (status, code) in ERRORS.items():
            if name in path:
                return self.answer(b"", status, {"X-Error-Code": code})
        if path.startswith("/api/models/org/tiny/revision/"):
            if path.rpartition("/")[2] not in ("main", COMMIT):
                return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            return self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}).encode())
        if path.startswith("/api/models/org/tiny/tree/"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": sha(data)} for name, data in FILES.items()]
            return self.answer(json.dumps(tree).encode())
        data = FILES[path.partition(f"/resolve/{COMMIT}/")[2]]
        return self.answer(data, headers={"X-Repo-Commit": COMMIT, "ETag": f'"{sha(data)}"'})

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("HANOK_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_repository_arrives_without_its_pickles_and_code(hub, tmp_path, capfd):
    calls = []
    got = fetch("hf:org/tiny", progress=lambda *call: calls.append(call))
    kept = {name: data for name, data in FILES.items() if not name.endswith((".bin", ".py"))}
    assert got.sha256 == {name: sha(data) for name, data in kept.items()}
    assert got.source == f"hf:org/tiny@{COMMIT}" and tmp_path / "home/cache/hub" in got.folder_or_file.parents
    assert not [path for path in hub.seen if path.endswith((".bin", ".py"))]
    assert calls[-1][2] == "org/tiny" and [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert calls[-1][0] == sum(map(len, kept.values()))
    n_seen = len(hub.seen)
    assert fetch("hf:org/tiny", offline=True) == fetch(f"hf:org/tiny@{COMMIT}", offline=True) == got
    assert len(hub.seen) == n_seen
    assert "%" not in capfd.readouterr().err


@pytest.mark.parametrize("source, told", [
    ("hf:org/closed", "is gated; accept its terms"), ("hf:org/none", "is not there, or is private"),
    ("hf:org/tiny@v9", "has no revision 'v9'"),
])
def test_what_the_hub_refuses_is_told_in_one_line(hub, source, told):
    with pytest.raises(HubError, match=told) as error:
        fetch(source)
    assert "\n" not in str(error.value)


def test_offline_and_unreachable_are_told_apart(hub, monkeypatch):
    with pytest.raises(HubError, match="is not whole in the cache, and offline was asked"):
        fetch("hf:org/tiny", offline=True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="is not whole in the cache, and the hub cannot be reached"):
        fetch("hf:org/tiny")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install 'hanok\[hub\]'"):
        fetch("hf:org/tiny")
