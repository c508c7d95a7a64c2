"""Wikipedia's dumps (MediaWiki's export format 0.10 and 0.11): each article as plain text, page by page, without a tree of the file.

Markup is parsed by mwparserfromhell. Templates, tables, references, galleries, formulas, files and categories go; the text of links, lists and
headings stays, each heading on a line of its own and only where something stands below it.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any
from xml.etree.ElementTree import ParseError, XMLParser

from hanok.data.reading import LONGEST_ROW, Counts, ReadOptions, documents, need
from hanok.data.sources import Document
from hanok.errors import DataError

FILE_LIKE = {"-2", "6", "14"}
"""Keys of the namespaces Media, File and Category: a link to one of them is no text. Their names in the dump's language stand in its head."""
FILE_NAMES = {"media", "file", "image", "category", "그림", "파일", "분류", "bild", "datei", "kategorie"}
"""The same by name: as every language may write them, and some that older pages still have."""
GONE = {"table", "ref", "references", "gallery", "math", "chem", "ce", "graph", "timeline", "score", "imagemap", "hiero", "inputbox", "templatedata",
        "templatestyles", "categorytree", "indicator", "mapframe", "maplink", "script", "style"}
"""Tags whose insides are no sentences."""
_ENDED = {3, 5, 6}
"""Expat's codes for a document that stops early: no element found, unclosed token, partial character."""
_SWITCH = re.compile(r"__[A-Z]{3,}__")
_HOLE = re.compile(r"(?: |(?<=[^\x00-\x7f]))[(（][\s,;:·、]*[)）]|(?<=[(（])[,;、]\s+|[,;、]\s+(?=[)）])")
_TABLE_LEFT = re.compile(r"^(\{\||\|\}|\|).*$", re.MULTILINE)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*:")
_GAP = re.compile(r"\n{3,}")
_MARK = "\0"
"""Stands before a heading's level while a page is put together; MediaWiki pages cannot hold it."""


def read_wikipedia(blocks: Iterable[bytes], name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """Articles as `name#title`; of several revisions the last. Redirects, other namespaces and pages that are no wikitext are left out.

    DataError: no dump, no well-formed XML, or cut short.
    """
    need("mwparserfromhell", "a Wikipedia dump")
    pages = _Pages()
    parser = XMLParser(target=pages)
    try:
        for block in blocks:
            parser.feed(block)
            if pages.root not in ("", "mediawiki"):
                raise DataError(f"{name}: XML that begins with <{pages.root[:40]}>, expected a MediaWiki dump; give it another suffix to "
                                "read it as text")
            yield from _articles(pages, name, options, counts)
        parser.close()
    except ParseError as error:
        if error.code in _ENDED:
            raise DataError(f"{name}: cut short, the XML stops before </mediawiki>; fetch it again") from None
        raise DataError(f"{name}: no well-formed XML ({error}); fetch it again") from None
    yield from _articles(pages, name, options, counts)


def plain_text(markup: str, file_names: set[str] = FILE_NAMES) -> str:
    """Wikitext as text: paragraphs, list items and headings on lines of their own."""
    return _tidy(_text_of(need("mwparserfromhell", "a Wikipedia dump").parse(markup.replace(_MARK, "")), file_names))


def _articles(pages: _Pages, name: str, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    done, pages.done = pages.done, []
    for page in done:
        here = f"{name}#{page.get('title', '')}"
        if page.get("ns", "0") != "0" or "redirect" in page or page.get("model", "wikitext") != "wikitext":
            continue
        markup = page.get("text")
        if markup is None:
            counts.refuse(f"{here}: a page without text, or of more than {LONGEST_ROW} characters", options)
        else:
            yield from documents(here, [plain_text(markup, pages.file_names)], options, counts)


class _Pages:
    """What an XML parser tells: finished pages collect in `done`, each as the texts of the elements that matter."""

    def __init__(self) -> None:
        self.root = ""
        self.file_names = set(FILE_NAMES)
        self.done: list[dict[str, str | None]] = []
        self._page: dict[str, str | None] = {}
        self._parts: list[str] | None = None
        self._length = 0

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        tag = tag.rpartition("}")[2]
        self.root = self.root or tag
        self._parts, self._length = None, 0
        if tag == "page":
            self._page = {}
        elif tag == "redirect":
            self._page["redirect"] = attributes.get("title", "")
        elif tag in ("title", "ns", "model", "text") or (tag == "namespace" and attributes.get("key") in FILE_LIKE):
            self._parts = []

    def data(self, text: str) -> None:
        if self._parts is not None:
            self._length += len(text)
            if self._length <= LONGEST_ROW:
                self._parts.append(text)

    def end(self, tag: str) -> None:
        tag = tag.rpartition("}")[2]
        if self._parts is not None:
            text = "".join(self._parts) if self._length <= LONGEST_ROW else None
            if tag == "namespace":
                self.file_names.add((text or "").strip().lower())
            else:
                self._page[tag] = text
            self._parts = None
        elif tag == "page":
            self.done.append(self._page)
            self._page = {}

    def close(self) -> None:
        """The document is over."""


def _text_of(code: Any, file_names: set[str]) -> str:
    """What a reader of the page would read of these nodes; a heading as _MARK, its level, its text."""
    parts: list[str] = []
    for node in code.nodes if code is not None else ():
        kind = type(node).__name__
        if kind == "Text":
            parts.append(node.value)
        elif kind == "Wikilink":
            parts.append(_link(node, file_names))
        elif kind == "ExternalLink":
            parts.append(_text_of(node.title, file_names) if node.brackets else str(node.url))
        elif kind == "HTMLEntity":
            parts.append(_entity(node))
        elif kind == "Heading":
            parts.append(f"\n{_MARK}{node.level}{' '.join(_text_of(node.title, file_names).split())}\n")
        elif kind == "Tag":
            tag = str(node.tag).strip().lower()
            if tag == "br":
                parts.append("\n")
            elif tag not in GONE and not (node.wiki_markup and node.self_closing):
                parts.append(_text_of(node.contents, file_names))
    return "".join(parts)


def _link(node: Any, file_names: set[str]) -> str:
    target = str(node.title).strip()
    before, colon, _ = target.partition(":")
    if colon and before.strip().lower().replace("_", " ") in file_names:
        return ""
    if node.text is not None:
        return _text_of(node.text, file_names)
    return "" if _LANGUAGE.match(target) else _text_of(node.title, file_names).strip().removeprefix(":")


def _entity(node: Any) -> str:
    try:
        text = node.normalize()
    except (ValueError, OverflowError):
        return ""
    return "" if text == _MARK or "\ud800" <= text <= "\udfff" else text


def _tidy(text: str) -> str:
    """Without what markup leaves behind: holes where templates stood, empty sections, runs of empty lines."""
    text = _TABLE_LEFT.sub("", _HOLE.sub("", _SWITCH.sub("", text)))
    kept: list[str] = []
    levels: list[int] = []                       # of the headings at the end of `kept` that have nothing below them yet
    for line in (*map(str.strip, text.split("\n")), f"{_MARK}0"):
        if line.startswith(_MARK):
            level, line = int(line[1]), line[2:].strip()
            while levels and levels[-1] >= level:
                levels.pop()
                while kept and not kept[-1]:
                    kept.pop()
                kept.pop()
            if level and line:
                kept += ["", line, ""]
                levels.append(level)
        elif line:
            levels.clear()
            kept.append(line)
        else:
            kept.append("")
    return _GAP.sub("\n\n", "\n".join(kept)).strip()
