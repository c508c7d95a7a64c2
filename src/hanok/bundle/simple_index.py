"""Finds the file of one exact version through the Simple API, over every place that pip's settings name. Nothing is installed.

JSON (PEP 691) and HTML (PEP 503) are offered in one request; folders on disk, with or without an index.html, answer as well. Local places are asked
first, and the first place that has the version decides. Yanked files stay allowed, as PEP 592 says of an exact pin.
"""
from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

from hanok.bundle.download import Client, Page, without_login
from hanok.bundle.pip_settings import PipSettings
from hanok.disk import read_bytes
from hanok.errors import HubError

JSON_TYPE = "application/vnd.pypi.simple.v1+json"
HTML_TYPES = ("application/vnd.pypi.simple.v1+html", "text/html")
ACCEPT = f"{JSON_TYPE}, {HTML_TYPES[0]};q=0.2, {HTML_TYPES[1]};q=0.1"
SDIST_SUFFIXES = (".tar.gz", ".zip")
SHA256 = "[0-9a-fA-F]{64}"
_VERSION_WORDS = {"alpha": "a", "beta": "b", "c": "rc", "pre": "rc", "preview": "rc", "rev": "post", "r": "post"}


@dataclass(frozen=True)
class Distribution:
    """A wheel or source archive that an index offers."""
    filename: str
    version: str
    url: str
    sha256: str | None                       # in hexadecimal, as the index states it

    @property
    def path(self) -> Path | None:
        """Where it lies on this machine, or None for a file that has to be fetched."""
        return _local_path(self.url)

    @property
    def rank(self) -> tuple[bool, int, str]:
        """Smaller is better: what can be checked, then wheels for every machine, other wheels, tar.gz, zip."""
        if self.filename.endswith(".whl"):
            python, abi, platform = self.filename.removesuffix(".whl").split("-")[-3:]
            kind = 0 if "py3" in python.split(".") and (abi, platform) == ("none", "any") else 1
        else:
            kind = 2 + SDIST_SUFFIXES.index(next(suffix for suffix in SDIST_SUFFIXES if self.filename.endswith(suffix)))
        return self.sha256 is None and self.path is None, kind, self.filename


def normalise(name: str) -> str:
    """A project's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def same_version(version: str) -> str:
    """One spelling for versions that PEP 440 holds equal: 1.0, v1.0.0 and 1.00; 1.0-RC.1 and 1.0rc1; 2.1+CPU and 2.1+cpu."""
    public, plus, local = version.strip().lower().removeprefix("v").partition("+")
    public = re.sub(r"[-_.]?([a-z]+)[-_.]?", lambda word: _VERSION_WORDS.get(word[1], word[1]), public)
    public = re.sub(r"\d+", lambda digits: str(int(digits[0])), public)
    release = re.split(r"[^\d.!]", public, maxsplit=1)[0]
    return re.sub(r"(\.0)+$", "", release) + public[len(release):] + plus + re.sub(r"[-_.]", ".", local)


def version_of(filename: str, name: str) -> str | None:
    """The version that a wheel's or source archive's file name states, or None if it is not one of `name` (normalised)."""
    if not re.fullmatch(r"[\w.!+-]+", filename):
        return None
    if filename.endswith(".whl"):
        parts = filename.removesuffix(".whl").split("-")
        return parts[1] if len(parts) in (5, 6) and normalise(parts[0]) == name else None
    stem = next((filename.removesuffix(suffix) for suffix in SDIST_SUFFIXES if filename.endswith(suffix)), "")
    for dash in re.finditer("-", stem):
        if normalise(stem[:dash.start()]) == name and re.match(r"v?\d", stem[dash.end():]):
            return stem[dash.end():]
    return None


def find(client: Client, settings: PipSettings, name: str, version: str, offline: bool = False) -> Distribution:
    """The best file of that version. HubError says what exists instead, or what could not be reached."""
    places = [(_url(place), False) for place in settings.find_links] + [(_url(place), True) for place in settings.index_urls]
    if not places:
        raise HubError("pip's settings forbid the index (no-index) and name no find-links; set one of them")
    places.sort(key=lambda place: _local_path(place[0]) is None)
    versions: set[str] = set()
    troubles: list[str] = []
    for url, is_index in places:
        if offline and _local_path(url) is None:
            continue
        try:
            offered = list(_distributions(client, f"{url.rstrip('/')}/{quote(name)}/" if is_index else url, name))
        except HubError as error:
            troubles.append(str(error))
            continue
        exact = [dist for dist in offered if same_version(dist.version) == same_version(version)]
        if exact:
            return min(exact, key=lambda dist: dist.rank)
        versions |= {dist.version for dist in offered}
    raise HubError(_absence(name, version, versions, troubles, [without_login(url) for url, _ in places], offline))


def _absence(name: str, version: str, versions: set[str], troubles: list[str], places: list[str], offline: bool) -> str:
    if offline:
        return f"pypi:{name}=={version} is not in the cache, and offline was asked; fetch it once with a network"
    also = f" (and {troubles[0]})" if troubles else ""
    if versions:
        near = difflib.get_close_matches(version, versions, n=5, cutoff=0.0)
        listed = ", ".join(sorted(near, key=lambda text: [int(digits) for digits in re.findall(r"\d+", text)]))
        return f"{name} has no version {version}; the nearest are {listed}; write pypi:{name}=={near[0]}{also}"
    if troubles:
        return troubles[0]
    return f"no package '{name}' at {', '.join(places)}; check its spelling, or name another place in pip's extra-index-url"


def _distributions(client: Client, url: str, name: str) -> Iterator[Distribution]:
    for filename, link, sha256 in _links(client, url):
        version = version_of(filename, name)
        if version is not None:
            yield Distribution(filename, version, link, sha256.lower() if sha256 else None)


def _links(client: Client, url: str) -> Iterator[tuple[str, str, str | None]]:
    """File name, URL and SHA-256 of everything that a page or folder offers."""
    path = _local_path(url)
    if path is None:
        page = client.get(url, ACCEPT)
        if page is not None:
            yield from (link for link in _page_links(page) if urlsplit(link[1]).scheme in ("http", "https"))
    elif path.is_dir():
        if (path / "index.html").is_file():
            yield from _html_links(Page(path.as_uri() + "/", "text/html", read_bytes(path / "index.html")))
        yield from ((file.name, file.as_uri(), None) for file in sorted(path.iterdir()) if file.is_file())
    elif path.is_file():
        yield from _html_links(Page(path.as_uri(), "text/html", read_bytes(path)))


def _page_links(page: Page) -> Iterator[tuple[str, str, str | None]]:
    if page.content_type in HTML_TYPES:
        yield from _html_links(page)
        return
    try:
        if page.content_type != JSON_TYPE:
            raise ValueError(f"it is {page.content_type}")
        files = json.loads(page.body)["files"]
        links = [(str(file["filename"]), urljoin(page.url, urldefrag(file["url"])[0]), file.get("hashes", {}).get("sha256")) for file in files]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise HubError(f"{without_login(page.url)} is no package index page ({reason}); check pip's index-url") from None
    yield from ((filename, url, sha256 if re.fullmatch(SHA256, str(sha256)) else None) for filename, url, sha256 in links)


def _html_links(page: Page) -> Iterator[tuple[str, str, str | None]]:
    anchors = _Anchors(page.url)
    anchors.feed(page.body.decode("utf-8", errors="replace"))
    for href in anchors.links:
        url, fragment = urldefrag(href)
        stated = re.search(rf"(?:^|&)sha256=({SHA256})", fragment)
        yield unquote(urlsplit(url).path.rpartition("/")[2]), url, stated[1] if stated else None


class _Anchors(HTMLParser):
    def __init__(self, base: str):
        super().__init__()
        self.base = base
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        with contextlib.suppress(ValueError):            # a link that is no URL leads nowhere
            if href and tag == "base":
                self.base = urljoin(self.base, href)
            elif href and tag == "a":
                self.links.append(urljoin(self.base, href))


def _url(place: str) -> str:
    return place if re.match(r"[a-z]+:", place) else Path(place).expanduser().absolute().as_uri()


def _local_path(url: str) -> Path | None:
    return Path(unquote(urlsplit(url).path)) if url.startswith("file:") else None
