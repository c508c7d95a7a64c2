"""Where this machine takes its packages from: pip's configuration, read as pip reads it, so that what `pip` reaches hanok reaches too.

Files lie over each other in pip's order (global, user, site, PIP_CONFIG_FILE), [install] and [download] over [global], and `PIP_*` variables over
all. https://pip.pypa.io/en/stable/topics/configuration/
"""
from __future__ import annotations

import configparser
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from hanok.disk import read_text
from hanok.errors import HubError
from hanok.runtime import environment, environment_with_prefix

_SECTIONS = ("global", "install", "download")


@dataclass(frozen=True)
class PipSettings:
    """What pip's configuration says about places. A place is a URL (http, https, file) or a local path."""
    index_urls: tuple[str, ...]              # index-url, then every extra-index-url; none where no-index is set
    find_links: tuple[str, ...] = ()         # folders or HTML pages that hold or link to files
    cert: str = ""                           # a file or folder of certificate authorities; empty: the system's
    trusted_hosts: tuple[str, ...] = ()      # host or host:port whose certificate, or lack of TLS, is accepted


def read_pip_settings() -> PipSettings:
    """pip's settings. HubError on a file that cannot be read, a `no-index` that is no truth value, or no index at all and no pip to name one."""
    options = _options()
    forbidden = _truth("no-index", options.get("no-index", "no"))
    index_urls = () if forbidden else (options.get("index-url") or _default_index(), *options.get("extra-index-url", "").split())
    find_links, trusted_hosts = (tuple(options.get(name, "").split()) for name in ("find-links", "trusted-host"))
    return PipSettings(index_urls, find_links, options.get("cert", ""), trusted_hosts)


def _options() -> dict[str, str]:
    sections: dict[str, dict[str, str]] = {name: {} for name in _SECTIONS}
    for path in _config_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read_string(read_text(path), str(path))
        except configparser.Error as error:
            raise HubError(f"{path}: {' '.join(str(error).split())}; correct this pip configuration file") from None
        for name in _SECTIONS:
            if parser.has_section(name):
                sections[name].update((_option_name(option), value.strip()) for option, value in parser.items(name))
    sections["environment"] = {_option_name(name.removeprefix("PIP_")): value for name, value in environment_with_prefix("PIP_").items()}
    return {option: value for section in sections.values() for option, value in section.items() if value}


def _option_name(name: str) -> str:
    return name.lower().replace("_", "-").removeprefix("--")


def _config_files() -> list[Path]:
    """The files that exist, weakest first."""
    named = environment("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    home = Path.home()
    if sys.platform == "darwin":
        support = home / "Library/Application Support/pip"
        site_wide, user = [Path("/Library/Application Support/pip")], support if support.is_dir() else home / ".config/pip"
    else:
        site_wide = [Path(folder) / "pip" for folder in (environment("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)] + [Path("/etc")]
        user = Path(environment("XDG_CONFIG_HOME") or home / ".config") / "pip"
    files = [folder / "pip.conf" for folder in site_wide]
    if not (named and Path(named).exists()):
        files += [home / ".pip/pip.conf", user / "pip.conf"]
    files.append(Path(sys.prefix) / "pip.conf")
    if named:
        files.append(Path(named))
    return [path for path in files if path.is_file()]


def _truth(option: str, value: str) -> bool:
    if value.lower() in ("y", "yes", "t", "true", "on", "1"):
        return True
    if value.lower() in ("n", "no", "f", "false", "off", "0"):
        return False
    raise HubError(f"pip's setting {option} is '{value}'; expected yes or no")


def _default_index() -> str:
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        raise HubError("no package index is configured and pip is not installed to name one; set PIP_INDEX_URL, or index-url in pip.conf") from None
    return PyPI.simple_url
