"""`pull`: fetch a model, make a bundle of it, keep it below HANOK_HOME/models under its name, so that every verb finds it by that name."""
from __future__ import annotations

import re
from pathlib import Path

from hanok import runtime
from hanok.bundle.bundle import Bundle, is_bundle, save_bundle
from hanok.bundle.download import Progress
from hanok.bundle.hub import CATALOGUE, Fetched, fetch
from hanok.bundle.imports import load_any
from hanok.config import read_json
from hanok.disk import refuse_occupied
from hanok.errors import DataError


def models_dir() -> Path:
    """Where pulled bundles live."""
    return runtime.home() / "models"


def name_of(source: str) -> str:
    """The name that a source's bundle gets: its alias where we know it, else its last part."""
    alias = next((alias for alias, known in CATALOGUE.items() if source in (alias, known.source)), None)
    if alias is not None:
        return alias
    last = re.split(r"[/#:]", source.rstrip("/"))[-1]
    name = re.sub(r"[^\w.-]+", "-", last.removesuffix(".gguf").split("@")[0]).strip("-.").lower() or "model"
    return f"{name}-local" if name in CATALOGUE else name                             # a known name means the known model


def canonical(source: str) -> str:
    """One spelling for what is one source: a known name as what it stands for, a path in full."""
    if source in CATALOGUE:
        return CATALOGUE[source].source
    path = Path(source.removeprefix("file:"))
    return str(path.resolve()) if path.exists() else source


def pull(source: str, to: Path | str | None = None, *, progress: Progress | None = None, offline: bool = False) -> Path:
    """The bundle's folder. What was pulled before is found again without a network. HanokError on anything that is not as it should be."""
    out = Path(to) if to is not None else models_dir() / name_of(source)
    asked = canonical(source)
    if to is not None:
        refuse_occupied(out)
    elif is_bundle(out):
        parent = read_json(out / "manifest.json").get("parent", {})
        before = canonical(str(parent.get("asked") or parent.get("source")))
        if asked != before:
            raise DataError(f"the name {out.name} is taken: it was pulled from {before}; choose a folder for {source} with --to")
        return out
    save_bundle(_bundle(fetch(source, progress=progress, offline=offline), asked), out)
    return out


def _bundle(fetched: Fetched, asked: str) -> Bundle:
    bundle = load_any(fetched.folder_or_file)
    parent = {**bundle.manifest.get("parent", {}), "asked": asked, "source": fetched.source, "files_sha256": fetched.sha256}
    bundle.manifest = {**bundle.manifest, "parent": parent, **({"licence": fetched.licence} if fetched.licence else {})}
    return bundle


def find(name: str | Path) -> Path:
    """A bundle's folder: a path, or the name of a pulled one. DataError says what there is."""
    path = Path(name)
    if path.exists():
        return path
    pulled = models_dir() / str(name)
    if re.fullmatch(r"[\w.-]+", str(name)) and is_bundle(pulled):
        return pulled
    here = sorted(p.name for p in models_dir().glob("*") if is_bundle(p)) if models_dir().is_dir() else []
    known = f"pulled are {', '.join(here)}; " if here else ""
    more = f"`hanok pull {name}` fetches it" if str(name) in CATALOGUE else f"`hanok pull` fetches {', '.join(CATALOGUE)}"
    raise DataError(f"{name}: there is no such bundle; {known}{more}")
