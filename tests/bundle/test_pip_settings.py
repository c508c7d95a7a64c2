"""pip's settings, held against pip itself."""
from __future__ import annotations

import builtins
import os
import sys

import pytest

from hanok.bundle.pip_settings import PipSettings, read_pip_settings
from hanok.errors import HubError
from hanok.runtime import environment_with_prefix


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """A home, system and environment folder of this test's own."""
    for name in environment_with_prefix("PIP_"):
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    return tmp_path


def as_pip_reads_them() -> PipSettings:
    from pip._internal.commands import create_command
    options = create_command("install").parser.get_default_values()
    index_urls = () if options.no_index else (options.index_url, *options.extra_index_urls)
    return PipSettings(index_urls, tuple(options.find_links), options.cert or "", tuple(options.trusted_hosts))


WEAKEST_FIRST = ("XDG_CONFIG_DIRS/pip/pip.conf", "HOME/.pip/pip.conf", "XDG_CONFIG_HOME/pip/pip.conf", "prefix/pip.conf")


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("n_files", range(len(WEAKEST_FIRST) + 1))
@pytest.mark.parametrize("named", [False, True])
def test_files_lie_over_each_other_as_with_pip(places, monkeypatch, n_files, named):
    for name in WEAKEST_FIRST[:n_files]:
        write(places, name, f"[global]\nindex-url = https://{name.partition('/')[0]}.example/simple\nextra_index_url =\n  file:///a\n  file:///{name}\n")
    if named:
        named_file = write(places, "named.conf",
                           "[global]\ntrusted-host = a b:80\ncert = /c\n[install]\nfind-links = /w ~/x\n[list]\nindex-url = no\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(named_file))
    ours = read_pip_settings()
    assert ours == as_pip_reads_them()
    assert ours.find_links == (("/w", "~/x") if named else ())
    if n_files == len(WEAKEST_FIRST):
        assert ours.index_urls == ("https://prefix.example/simple", "file:///a", "file:///prefix/pip.conf")


@pytest.mark.parametrize("environment", [
    {}, {"PIP_INDEX_URL": "https://e.example/simple"}, {"PIP_INDEX_URL": ""}, {"PIP_EXTRA_INDEX_URL": "file:///x  file:///y"},
    {"PIP_NO_INDEX": "yes"}, {"PIP_NO_INDEX": "0"}, {"PIP_FIND_LINKS": "/one /two"}, {"PIP_CERT": "/e"}, {"PIP_TRUSTED_HOST": "h"},
    {"PIP_CONFIG_FILE": os.devnull}, {"PIP_CONFIG_FILE": "/not/there"},
])
def test_variables_lie_over_sections_and_install_over_global_as_with_pip(places, monkeypatch, environment):
    write(places, "HOME/.pip/pip.conf", "[install]\nindex-url = https://i.example/simple\nfind-links =\n[global]\nindex-url = https://g.example/simple\n"
                                        "find-links = /g\ncert = /c\nextra-index-url = file:///g\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_pip_settings() == as_pip_reads_them()


def test_the_download_section_counts_too(places):
    write(places, "HOME/.pip/pip.conf", "[download]\nindex-url = https://d.example/simple\n[global]\nindex-url = https://g.example/simple\n")
    assert read_pip_settings().index_urls == ("https://d.example/simple",)


def test_what_cannot_be_read_is_told(places, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "perhaps")
    with pytest.raises(HubError, match="no-index is 'perhaps'; expected yes or no"):
        read_pip_settings()
    write(places, "HOME/.pip/pip.conf", "index-url = before any section\n")
    with pytest.raises(HubError, match=r"pip\.conf: .*no section headers.*correct this pip configuration file"):
        read_pip_settings()


def test_without_pip_an_index_has_to_be_named(monkeypatch):
    real_import = builtins.__import__

    def without_pip(name, *args, **kwargs):
        if name.startswith("pip."):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pip)
    with pytest.raises(HubError, match="pip is not installed to name one; set PIP_INDEX_URL"):
        read_pip_settings()
    monkeypatch.setenv("PIP_INDEX_URL", "https://e.example/simple")
    assert read_pip_settings().index_urls == ("https://e.example/simple",)
