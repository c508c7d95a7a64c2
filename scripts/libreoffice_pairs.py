"""Sentence pairs out of LibreOffice's help in two languages (MPL-2.0), for `hanok ladder` and translation recipes: file, source, target, tab between.

    apt-get download libreoffice-help-en-us libreoffice-help-de        # Debian's packages; they need no installation
    for p in libreoffice-help-*.deb; do dpkg-deb -x "$p" help; done
    python scripts/libreoffice_pairs.py help/usr/share/libreoffice/help en-US de pairs.tsv

Paragraphs and headings are paired by their file and id; a pair that came before, and one whose sides are equal, is left out.
"""
from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "title"}
IDS = re.compile(r"par_id|hd_id|tit|bm_id|par_")
SHORTEST = 4
"""Characters of a source."""


class Paragraphs(HTMLParser):
    """The text of each block with an id, by that id; the first of an id counts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: dict[str, str] = {}
        self.open: tuple[str, list[str]] | None = None

    def handle_starttag(self, tag, attrs):
        if tag in BLOCKS:
            name = dict(attrs).get("id") or ""
            self.open = (name, []) if IDS.match(name) else None
        elif tag == "br" and self.open:
            self.open[1].append(" ")

    def handle_endtag(self, tag):
        if tag in BLOCKS and self.open:
            name, parts = self.open
            text = " ".join("".join(parts).split())
            if text:
                self.found.setdefault(name, text)
            self.open = None

    def handle_data(self, data):
        if self.open:
            self.open[1].append(data)


def paragraphs(path: Path) -> dict[str, str]:
    parser = Paragraphs()
    parser.feed(path.read_text(encoding="utf-8", errors="replace"))
    return parser.found


def main() -> None:
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    root, source, target, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
    for language in (source, target):
        if not (root / language).is_dir():
            sys.exit(f"{root / language}: no such folder; unpack the help package of that language there")
    seen: set[tuple[str, str]] = set()
    with out.open("w", encoding="utf-8") as file:
        for path in sorted((root / source).rglob("*.html")):
            name = path.relative_to(root / source)
            if not (root / target / name).exists():
                continue
            theirs = paragraphs(root / target / name)
            for key, text in paragraphs(path).items():
                pair = (text, theirs.get(key, ""))
                if pair[1] and pair[0] != pair[1] and pair not in seen and len(text) >= SHORTEST:
                    seen.add(pair)
                    file.write("\t".join((str(name), *pair)) + "\n")
    print(f"{len(seen):,} pairs in {out}")


if __name__ == "__main__":
    main()
