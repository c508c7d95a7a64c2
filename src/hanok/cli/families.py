"""hanok families [NAME]"""
from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands


def families(
    name: Annotated[str | None, Parameter(help="A family, to see its presets with their sizes.")] = None,
    *,
    json: Json = False,
) -> None:
    """List the model families, or one family's presets with their sizes."""
    from hanok.models import catalog
    if name is None:
        told = [overview(family) for family in catalog.FAMILIES.values()]
        if json:
            emit({"families": told})
            return
        print_overview(told)
        next_commands(f"hanok families {catalog.DEFAULT}", f"hanok pretrain TEXT --family {catalog.DEFAULT} --out DIR")
        return
    family = catalog.family(name)
    presets = [{"preset": preset, **sizes(family, config)} for preset, config in family.presets.items()]
    if json:
        emit({**overview(family), "presets": presets})
        return
    print_presets(family, presets)
    if family.objective == "causal":
        next_commands(f"hanok pretrain TEXT --family {name} --preset {presets[0]['preset']} --out DIR")


def overview(family: Any) -> dict[str, Any]:
    """What a family is and where its models can go."""
    return {"family": family.name, "kind": family.kind, "objective": family.objective, "summary": family.summary,
            "presets": list(family.presets), "huggingface": sorted({table.architecture for table in family.hf}),
            "gguf": sorted({table.architecture for table in family.gguf})}


def sizes(family: Any, config: Any) -> dict[str, Any]:
    """A preset's parameters, counted without memory, and its config."""
    import torch

    from hanok.config import to_dict
    with torch.device("meta"):
        n = sum(parameter.numel() for parameter in family.build(config).parameters())
    return {"parameters": n, "config": to_dict(config)}


def print_overview(told: list[dict[str, Any]]) -> None:
    from hanok import report
    rows = [[f["family"], f["kind"], f["objective"], ", ".join(f["huggingface"]) or "-", ", ".join(f["gguf"]) or "-"] for f in told]
    print(report.table(["family", "kind", "learns", "Hugging Face", "GGUF"], rows, align="lllll"))
    print()
    for family in told:
        print(f"{family['family']}: {family['summary']}")


def print_presets(family: Any, presets: list[dict[str, Any]]) -> None:
    from hanok import report
    shared = [name for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len") if name in presets[0]["config"]]
    rows = [[p["preset"], report.count(p["parameters"]), *(p["config"][name] for name in shared)] for p in presets]
    print(f"{family.name}: {family.summary}\n")
    print(report.table(["preset", "parameters", *shared], rows, align="l" + "r" * (1 + len(shared))))
