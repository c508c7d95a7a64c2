"""A dump as its articles' sentences: page by page, without markup, and cut short or foreign XML in one line."""
from __future__ import annotations

import bz2
import tracemalloc
from itertools import chain
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from documents import read, refusal
from hanok.data import wikipedia
from hanok.data.formats import Counts, ReadOptions, find_units, read_unit
from hanok.data.wikipedia import plain_text, read_wikipedia
from hanok.errors import DataError

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="ko">
  <siteinfo><sitename>위키백과</sitename><namespaces>
    <namespace key="-2" case="first-letter">미디어</namespace><namespace key="0" case="first-letter" />
    <namespace key="1" case="first-letter">토론</namespace><namespace key="6" case="first-letter">사진첩</namespace>
    <namespace key="14" case="first-letter">갈래</namespace></namespaces></siteinfo>
"""


def page(title: str, *texts: str, ns: int = 0, redirect: str = "", model: str = "wikitext") -> str:
    inside = "".join(f"<revision><id>{number}</id><contributor><username>text</username></contributor><comment>text</comment><model>{model}</model>"
                     f'<format>text/x-wiki</format><text bytes="1" xml:space="preserve">{escape(text)}</text><sha1>x</sha1></revision>'
                     for number, text in enumerate(texts))
    to = f'<redirect title="{redirect}" />' if redirect else ""
    return f"<page><title>{escape(title)}</title><ns>{ns}</ns><id>1</id>{to}{inside}</page>\n"


def dump(path: Path, *pages: str) -> Path:
    data = (HEAD + "".join(pages) + "</mediawiki>\n").encode()
    path.write_bytes(bz2.compress(data) if path.suffix == ".bz2" else data)
    return path


def test_articles_come_out_and_nothing_else(tmp_path):
    path, counts = tmp_path / "kowiki-20260101-pages-articles.xml.bz2", Counts()
    dump(path, page("한옥 & 기와", "'''한옥'''은 [[집]]이다. a < b"), page("옛집", "#REDIRECT [[한옥]]", redirect="한옥"),
         page("토론:한옥", "말", ns=1), page("틀:한옥", "틀", ns=10), page("Data.json", "{}", model="json"), page("빈", "{{틀만}}"),
         page("둘", "old", "new [[사진첩:a.jpg|남김]][[갈래:b]]"))
    assert find_units([str(path)])[0].kind == "wikipedia"
    assert read(path, counts) == [("#한옥 & 기와", "한옥은 집이다. a < b"), ("#둘", "new")] and counts == Counts(empty=1)
    data = path.read_bytes()
    streams = HEAD.encode(), page("a", "one").encode(), page("b", "two").encode(), b"</mediawiki>"
    path.write_bytes(b"".join(map(bz2.compress, streams)))
    assert read(path) == [("#a", "one"), ("#b", "two")]
    path.write_bytes(data[:-30])
    assert "cut short" in refusal(path)


def test_xml_that_is_cut_or_foreign_is_one_line(tmp_path):
    path = dump(tmp_path / "a.xml", page("한옥", "집"), page("기와", "지붕"))
    whole = path.read_bytes()
    for end in (len(whole) - 15, len(whole) - 60, whole.index("지붕".encode()) + 1):
        path.write_bytes(whole[:end])
        assert "cut short, the XML stops before </mediawiki>" in refusal(path)
    path.write_bytes(whole.replace(b"</text>", b"</tex>", 1))
    assert "no well-formed XML" in refusal(path)
    path.write_bytes(b"<rss><mediawiki>" + bytes(0) + b"</mediawiki></rss>")
    assert "begins with <rss>, expected a MediaWiki dump" in refusal(path)
    path.write_text("<html>no dump</html>")
    assert read(path) == [("", "<html>no dump</html>")]


def test_a_page_of_any_length_ends_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "LONGEST_ROW", 1000)
    path, counts = dump(tmp_path / "a.xml", page("long", "x" * 5000), page("short", "text")), Counts()
    assert "a.xml#long: a page without text, or of more than 1000 characters" in refusal(path)
    assert read(path, counts, skip_bad=True) == [("#short", "text")] and counts == Counts(bad=1)


def test_memory_does_not_grow_with_a_page_that_never_ends():
    blocks = chain([HEAD.encode(), b"<page><title>long</title><text>"], (b"word " * 50_000 for _ in range(240)))
    tracemalloc.start()
    with pytest.raises(DataError, match="cut short"):
        list(read_wikipedia(blocks, "a.xml", ReadOptions(), Counts()))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 40_000_000, most


def test_memory_does_not_grow_with_the_dump(tmp_path):
    def peak(n_pages: int) -> int:
        path = dump(tmp_path / f"{n_pages}.xml.bz2", *(page(f"t{number}", f"word {number} " * 2000) for number in range(n_pages)))
        (unit,) = find_units([str(path)])
        tracemalloc.start()
        assert sum(1 for _ in read_unit(unit, ReadOptions(), Counts())) == n_pages
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(5)                                      # what is imported once
    assert peak(240) < 1.5 * peak(40)


@pytest.mark.parametrize("markup, expected", [
    ("'''bold''' ''it'' [[target|shown]] [[plain]]s [http://x.y label] [http://x.y] http://z.w", "bold it shown plains label  http://z.w"),
    ("a<ref>gone {{cite|x}}</ref> b<ref name=\"n\" /> c<!-- gone --> {{tpl|[[x]]|{{y}}}}d", "a b c d"),
    ('before\n{| class="wikitable"\n|-\n! h !! h\n|-\n| 1 || {{x|2}}\n|}\nafter', "before\n\nafter"),
    ("x [[File:a.jpg|thumb|200px|A [[link]] here]] [[Image:b.png]] [[파일:c.png|섬네일|설명]] [[category:z]]y", "x    y"),
    ("[[:Category:Shown]] [[:파일:보임|보임]] [[en:Hanok]]", "Category:Shown 보임"),
    ("* one\n* two\n# three\n: four\n----\nfive", "one\ntwo\nthree\nfour\n\nfive"),
    ("A &amp; B&nbsp;&lt;c&gt; &#54620; &#xD800; &#0;.", "A & B\xa0<c> 한  &#0;."),
    ("<nowiki>[[raw]]</nowiki> <code>x = f()</code><br />next <math>x^2</math>.", "[[raw]] x = f()\nnext ."),
    ("한옥(韓屋, {{llang|en|Hanok}})은 집({{lang|x}})이다 ({{tpl}}). f(a, b) 그리고 main()", "한옥(韓屋)은 집이다. f(a, b) 그리고 main()"),
    ("<gallery>\nFile:a.jpg|x\n</gallery>__NOTOC__ text", "text"), ("!Kung", "!Kung"), ("", ""), ("{{only|a template}}", "")])
def test_markup_becomes_what_a_reader_reads(markup, expected):
    assert plain_text(markup) == expected


def test_headings_stay_as_lines_where_something_stands_below_them():
    markup = ("lead\n== History ==\n=== '''Early''' [[days]] ===\ntext\n\n\n\n=== Empty ===\n{{tpl}}\n== Bare ==\n=== Barer ===\n"
              "== Last ==\n* item\n== References ==\n{{r}}")
    assert plain_text(markup) == "lead\n\nHistory\n\nEarly days\n\ntext\n\nLast\n\nitem"


@pytest.mark.parametrize("markup", ["[[open {{x|<b>''", "{|\n|-\n| never closed", "{{" * 3000, "[[" * 3000, "<ref>" * 500, "=" * 200,
                                    "\0" + "\0" + "9x\n\0", "'" * 999])
def test_broken_markup_breaks_nothing(markup):
    assert "\0" not in plain_text(markup + "\nafter")
