"""A package index on 127.0.0.1 that can stumble, and the wheels and source archives that stand on it: what the tests of fetching share."""
from __future__ import annotations

import hashlib
import io
import json
import re
import ssl
import tarfile
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

METADATA = "Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: BSD-2-Clause\n\nText.\n"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wheel(members: dict[str, bytes], name: str = "tiny_model", version: str = "1.0") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", METADATA.format(name=name, version=version))
    return out.getvalue()


def sdist_zip(members: dict[str, bytes], lead: str = "tiny_model-1.0/") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, data in {**members, "PKG-INFO": METADATA.format(name="tiny", version="1.0").encode()}.items():
            archive.writestr(lead + member, data)
    return out.getvalue()


def sdist(members: dict[str, bytes], lead: str = "tiny_model-1.0/", links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for member, data in {**members, "PKG-INFO": METADATA.format(name="tiny", version="1.0").encode()}.items():
            info = tarfile.TarInfo(lead + member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for member, target in (links or {}).items():
            info = tarfile.TarInfo(lead + member)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return out.getvalue()


@dataclass
class Seen:
    """One request, as the server saw it."""
    path: str
    headers: dict[str, str]

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass
class Shelf:
    """An index below /simple/ and its files below /files/. Its switches may be turned between requests."""
    files: dict[str, bytes] = field(default_factory=dict)             # file name -> content
    promises: dict[str, str | None] = field(default_factory=dict)     # file name -> another SHA-256 than the true one; None: none is stated
    form: str = "json"                                                # json, html or garbage
    ranges: bool = True                                               # whether Range is honoured
    cuts: list[int] = field(default_factory=list)                     # the next file answers end after so many bytes
    etag: str | None = None
    login: str | None = None                                          # the Authorization that is wanted
    moved_to: str | None = None                                       # files redirect to this server
    failures: list[int] = field(default_factory=list)                 # status codes of the next answers
    seen: list[Seen] = field(default_factory=list)
    url: str = ""

    @property
    def simple(self) -> str:
        return f"{self.url}/simple"

    def file_requests(self) -> list[Seen]:
        return [request for request in self.seen if request.path.startswith("/files/")]

    def page(self, project: str) -> bytes | None:
        names = [name for name in self.files if re.sub(r"[-_.]+", "-", name).startswith(f"{project}-")]
        if not names:
            return None
        promised = {name: self.promises.get(name, sha(self.files[name])) for name in names}
        if self.form == "json":
            files = [{"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": promised[name]} if promised[name] else {}, "yanked": True}
                     for name in names]
            return json.dumps({"meta": {"api-version": "1.1"}, "name": project, "files": files}).encode()
        if self.form == "garbage":
            return b"{"
        anchors = [f'<a data-yanked="" href="../../files/{name}{f"#sha256={promised[name]}" if promised[name] else ""}">{name}</a>' for name in names]
        return ("<!DOCTYPE html><html><body>" + "<br/>".join(anchors) + "</body></html>").encode()


class Server:
    """Serves a shelf until it is left; `certificate` (a PEM file with its key) makes it speak TLS."""

    def __init__(self, shelf: Shelf, certificate: Path | None = None):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(shelf))
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        shelf.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Server:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def _handler(shelf: Shelf) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            shelf.seen.append(Seen(self.path, headers))
            if shelf.failures:
                self.send_error(shelf.failures.pop(0))
            elif shelf.login and headers.get("authorization") != shelf.login:
                self.send_error(401)
            elif self.path.startswith("/simple/"):
                self.answer_page(shelf.page(self.path.split("/")[2]))
            elif shelf.moved_to:
                self.send_response(302)
                self.send_header("Location", shelf.moved_to + self.path)
                self.end_headers()
            else:
                self.answer_file(shelf.files.get(self.path.removeprefix("/files/")), headers.get("range"))

        def answer_page(self, body: bytes | None) -> None:
            if body is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if shelf.form == "html" else "application/vnd.pypi.simple.v1+json")
            self.end_headers()
            self.wfile.write(body)

        def answer_file(self, data: bytes | None, asked: str | None) -> None:
            if data is None:
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and shelf.ranges else 0
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if shelf.etag:
                self.send_header("ETag", shelf.etag)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = start + shelf.cuts.pop(0) if shelf.cuts else len(data)
            try:
                self.wfile.write(data[start:end])
            except ConnectionError:
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    return Handler
