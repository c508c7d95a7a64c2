"""hanok show BUNDLE"""
from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from hanok.cli.output import Json, emit, next_commands, typed


def show(bundle: Annotated[str, Parameter(help="A bundle's folder, or the name of a pulled model.")], *, json: Json = False) -> None:
    """Say what a bundle is: family, sizes, parameters by part, memory at each precision, tokenizer, template, lineage."""
    from hanok import report
    from hanok.bundle.bundle import count_parameters, load_bundle
    from hanok.bundle.pull import find
    from hanok.config import to_dict
    path = find(bundle)
    loaded = load_bundle(path)
    parts = count_parameters(loaded.model)
    n = sum(parts.values())
    stored = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    memory = {"float32": 4 * n, "bfloat16": 2 * n, "int8": n, "4-bit": n // 2}
    tokenizer = loaded.tokenizer
    told = {
        "bundle": str(path), "family": loaded.family.name, "sizes": to_dict(loaded.config), "parameters": {**parts, "total": n},
        "stored_as": stored, "memory_bytes": memory,
        "tokenizer": None if tokenizer is None else {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                                                     "pre_tokenizer": tokenizer.pre_tokenizer, "specials": len(tokenizer.specials)},
        "chat_template": loaded.chat_template is not None, "generation": to_dict(loaded.generation), "lineage": loaded.manifest,
    }
    if json:
        emit(told)
        return
    print(f"{bundle}: {loaded.family.summary}\n")
    print(report.table(["size", "value"], [[name, f"{value:.6g}" if isinstance(value, float) else str(value)]
                                           for name, value in to_dict(loaded.config).items()], align="lr"), end="\n\n")
    print(report.table(["parameters", "count", "share"], [[part, report.count(m), f"{m / n:.0%}"] for part, m in [*parts.items(), ("total", n)]],
                       align="lrr"), end="\n\n")
    print(report.table(["weights as", "memory"], [[f"{dtype} (stored)" if dtype == stored else dtype, report.size(size)]
                                                  for dtype, size in memory.items()], align="lr"), end="\n\n")
    if tokenizer is not None:
        pre = f", pre-tokenizer {tokenizer.pre_tokenizer}" if tokenizer.pre_tokenizer else ""
        print(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {len(tokenizer.specials)} special{pre}")
    else:
        print("tokenizer: none, so it cannot read text")
    print(f"chat template: {'yes' if loaded.chat_template else 'no'}")
    for name, value in lineage(loaded.manifest):
        print(f"{name}: {value}")
    writes, name = loaded.family.kind != "encoder", typed(bundle)
    next_commands(f"hanok import {typed(path)} NEW --tokenizer FILE" if tokenizer is None else f"hanok chat {name}" if loaded.chat_template
                  else f'hanok generate {name} --prompt "..."' if writes else f"hanok export {name} --to hf OUT")


def lineage(manifest: dict) -> list[tuple[str, str]]:
    """Where it comes from, in few lines."""
    rows = [(name, str(manifest[name])) for name in ("licence", "seed") if name in manifest]
    for name in ("parent", "metrics", "data", "versions"):
        if isinstance(manifest.get(name), dict):
            rows.append((name, ", ".join(f"{key} {value}" for key, value in manifest[name].items() if not isinstance(value, dict | list))))
    return [row for row in rows if row[1]]
