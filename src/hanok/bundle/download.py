"""The one place that speaks HTTP: pages, and downloads that go on where they were cut.

What was received so far waits in `NAME.STAMP.part`, where STAMP stands for the server's ETag and the size: a file that changed starts over.
Passwords go only to the host that they were given for (RFC 7617); a Range is asked as RFC 9110, section 14 says.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from hanok import __version__
from hanok.bundle.pip_settings import PipSettings
from hanok.disk import disk_error
from hanok.errors import HubError

RETRY_DELAYS_S = (0.0, 1.0, 3.0)
TIMEOUT_S = 30.0
BLOCK_BYTES = 1 << 18

Progress = Callable[[int, int | None, str], None]
"""Called with the bytes done, the bytes in all (None: unknown) and the file's name."""
T = TypeVar("T")


@dataclass(frozen=True)
class Page:
    """An answer that is read whole; `url` is where redirects led."""
    url: str
    content_type: str
    body: bytes


class Client:
    """Opens URLs with pip's certificates, trusted hosts and passwords, and the proxies that urllib finds."""

    def __init__(self, settings: PipSettings):
        self._gate = _Gate(settings.trusted_hosts)
        self._opener = urllib.request.build_opener(self._gate, _Https(settings))

    def get(self, url: str, accept: str) -> Page | None:
        """The page, or None where the server has none. HubError where it cannot be had."""
        def once() -> Page | None:
            try:
                with self._open(url, {"Accept": accept}) as response:
                    return Page(response.url, response.headers.get_content_type(), response.read())
            except urllib.error.HTTPError as error:
                if error.code not in (404, 410):
                    raise
                error.close()
                return None
        return _patiently(once, url)

    def download(self, url: str, target: Path, progress: Progress | None = None) -> None:
        """Writes the file to `target`, continuing a part of it that is there. HubError where it cannot be had; the part stays."""
        _patiently(lambda: self._continue(url, target, progress), url)

    def _open(self, url: str, headers: dict[str, str]) -> Any:
        self._gate.learn(url)
        request = urllib.request.Request(without_login(url), headers={"User-Agent": f"hanok/{__version__}", **headers})
        return self._opener.open(request, timeout=TIMEOUT_S)

    def _continue(self, url: str, target: Path, progress: Progress | None) -> None:
        part = next(target.parent.glob(f"{target.name}.*.part"), None)
        have = part.stat().st_size if part else 0
        try:
            response = self._open(url, {"Range": f"bytes={have}-"} if have else {})
        except urllib.error.HTTPError as error:
            if error.code != 416 or part is None:
                raise
            error.close()
            part.unlink()
            self._continue(url, target, progress)
            return
        with response:
            start, total = _extent(response)
            stamp = f"{response.headers.get('ETag') or response.headers.get('Last-Modified')} {total}"
            current = target.with_name(f"{target.name}.{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.part")
            if part and (start != have or current != part):
                part.unlink()
                if start:
                    self._continue(url, target, progress)
                    return
            elif start != have:
                raise _Cut("the server sent a part that was not asked for")
            done = start
            with _writing(target), open(current, "ab" if start else "wb") as sink:
                while block := _receive(response):
                    sink.write(block)
                    done += len(block)
                    if progress:
                        progress(done, total, target.name)
                sink.flush()
                os.fsync(sink.fileno())
        if total is not None and done != total:
            raise _Cut(f"the connection ended after {done} of {total} bytes")
        with _writing(target):
            os.replace(current, target)


class _Gate(urllib.request.BaseHandler):
    """Sees every request, redirected ones too: refuses plain HTTP to strangers and adds the login of the request's own host."""

    def __init__(self, trusted_hosts: tuple[str, ...]):
        self.trusted_hosts = trusted_hosts
        self.logins: dict[tuple[str, str], str] = {}

    def learn(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.logins[_host(without_login(url))] = "Basic " + base64.b64encode(pair.encode()).decode()

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        host = urlsplit(request.full_url).hostname or ""
        near = host == "localhost" or host == "::1" or host.startswith("127.")
        if request.type == "http" and not near and not _trusted(request.full_url, self.trusted_hosts):
            raise HubError(f"{without_login(request.full_url)} is not encrypted; use https, or name {host} in pip's trusted-host")
        return self.https_request(request)

    def https_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if login := self.logins.get(_host(request.full_url)):
            request.add_unredirected_header("Authorization", login)
        return request


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, settings: PipSettings):
        super().__init__()
        self.trusted_hosts = settings.trusted_hosts
        cert = settings.cert
        try:
            is_folder = Path(cert).is_dir()
            self.verified = ssl.create_default_context(cafile=None if is_folder else cert or None, capath=cert if cert and is_folder else None)
        except OSError as error:
            raise HubError(f"pip's cert {cert} cannot be used ({error.strerror or error}); name a file of PEM certificates") from None
        self.unverified = ssl.create_default_context()
        self.unverified.check_hostname = False
        self.unverified.verify_mode = ssl.CERT_NONE

    def https_open(self, request: urllib.request.Request) -> Any:
        context = self.unverified if _trusted(request.full_url, self.trusted_hosts) else self.verified
        return self.do_open(http.client.HTTPSConnection, request, context=context)


def without_login(url: str) -> str:
    """The URL without user and password: what may be shown."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _host(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _trusted(url: str, hosts: tuple[str, ...]) -> bool:
    parts = urlsplit(url)
    return parts.hostname in hosts or parts.netloc in hosts


def _extent(response: Any) -> tuple[int, int | None]:
    """The first byte that comes (-1: it does not say), and the size of the whole file."""
    if response.status == 206 and (found := re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))):
        return int(found[1]), int(found[2])
    if response.status == 206:
        return -1, None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


class _Cut(Exception):
    """The connection broke while a file came; apart from OSError, so that the disk's errors are not taken for the network's."""


def _receive(response: Any) -> bytes:
    try:
        return response.read(BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(error)) from error


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from None


def _patiently(once: Callable[[], T], url: str) -> T:
    """Does it, again after each delay while the network only stumbles. HubError when it stays broken or says no."""
    for delay in RETRY_DELAYS_S:
        try:
            return once()
        except (OSError, http.client.HTTPException, _Cut) as error:
            if not _passing(error):
                raise _refusal(url, error) from None
        time.sleep(delay)
    try:
        return once()
    except (OSError, http.client.HTTPException, _Cut) as error:
        raise _refusal(url, error) from None


def _passing(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (429, 500, 502, 503, 504)
    reason = getattr(error, "reason", error)
    return not isinstance(reason, ConnectionRefusedError | TimeoutError | socket.gaierror | ssl.SSLCertVerificationError)


def _refusal(url: str, error: Exception) -> HubError:
    place = without_login(url)
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.code in (401, 403):
            return HubError(f"{place} refuses access (HTTP {error.code}); put user:password@ before the host in pip's index-url")
        return HubError(f"{place} answers HTTP {error.code} {error.reason}; try again later, or choose another index-url")
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLCertVerificationError):
        return HubError(f"{place}: its certificate is not trusted ({reason.verify_message}); name the right authorities in PIP_CERT")
    told = reason.strerror if isinstance(reason, OSError) and reason.strerror else " ".join(str(reason).split()) or type(reason).__name__
    return HubError(f"{place} cannot be reached ({told}); check the network and pip's index-url, then run this again: it goes on from here")
