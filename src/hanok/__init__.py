"""hanok: one toolkit for the whole life of a Transformer.

    import hanok
    m = hanok.load("runs/mine")
    m.generate("def ", max_new_tokens=32).text
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hanok.api import Answer, LoadedModel, load

__version__ = "0.1.0"
__all__ = ["Answer", "LoadedModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """torch is imported when a model is first asked for, not before."""
    if name in ("Answer", "LoadedModel", "load"):
        from hanok import api
        return getattr(api, name)
    raise AttributeError(f"module 'hanok' has no attribute '{name}'")
