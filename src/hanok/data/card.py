"""The data card: what is in a corpus and what is not, for machines (card.json) and for people (card.md). The same build writes the same card."""
from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

import hanok
from hanok import disk
from hanok.config import from_dict, read_json
from hanok.data.corpus import CorpusInfo, shard_path
from hanok.data.dedup import EMPTY, EXACT, NEAR
from hanok.data.minhash import BANDS, ROWS, SCRIPTS, SHINGLE
from hanok.data.shards import SIDES
from hanok.data.spool import Spool
from hanok.report import count, markdown_table, size


def describe(spool: Spool, states: np.ndarray, folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """card.json of the two corpora in `folder`; `told` is what only the build knows."""
    scripts, gone = np.zeros(len(SCRIPTS), np.int64), {state: np.zeros(2, np.int64) for state in (EXACT, NEAR, EMPTY)}
    for start, chunk in spool.chunks():
        of, documents = states[start:start + chunk.n_documents], chunk.documents
        scripts += documents["scripts"][np.isin(of, tuple(SIDES.values()))].sum(0, dtype=np.int64)
        for state, sums in gone.items():
            sums += (of == state).sum(), documents["bytes"][of == state].sum().astype(np.int64)
    infos = {side: from_dict(CorpusInfo, read_json(folder / side / "corpus.json"), side) for side in SIDES}
    documents, n_bytes, n_tokens = (sum(getattr(info, name) for info in infos.values()) for name in ("documents", "bytes", "tokens"))
    return {
        "hanok": hanok.__version__, "documents": documents, "bytes": n_bytes, "tokens": n_tokens, "bytes_per_token": round(n_bytes / n_tokens, 4),
        **{side: {"documents": info.documents, "bytes": info.bytes, "tokens": info.tokens} for side, info in infos.items()},
        "duplicates": {"removed": told["dedup"], "exact": _two(gone[EXACT]), "near": _two(gone[NEAR]), "pairs_compared": told["pairs_compared"],
                       "shingle": SHINGLE, "bands": BANDS, "rows": ROWS, "jaccard": 0.8},
        "split_documents": told["split"], "bad": told["bad"], "empty": told["empty"] + int(gone[EMPTY][0]),
        "contamination": told["contamination"],
        "scripts": {name: round(float(n / scripts.sum()), 6) for name, n in sorted(zip(SCRIPTS, scripts), key=lambda pair: -pair[1]) if n},
        "options": {name: told[name] for name in ("validation", "encoding", "text_column", "skip_bad", "max_document")},
        "tokenizer_sha256": told["tokenizer_sha256"], "vocab_size": told["vocab_size"], "dtype": infos["train"].dtype, "end_id": told["end_id"],
        "shards": {f"{side}/{shard_path(folder / side, i).name}": disk.sha256(shard_path(folder / side, i))
                   for side, info in infos.items() for i in range(len(info.shards))},
        "sources": told["sources"],
    }


def page(card: dict[str, Any], name: str) -> str:
    """card.md."""
    gone, mixed, here = card["duplicates"], card["contamination"], shlex.quote(name)
    sides = [(side, f"{told['documents']:,}", size(told["bytes"]), f"{told['tokens']:,}") for side in SIDES for told in [card[side]]]
    sources = [(f"`{source['path']}`", source["kind"], size(source["bytes"]), f"`{(source['sha256'] or 'not a file')[:16]}`")
               for source in card["sources"]]
    of = f"{mixed['of']:,} of them" + ("" if mixed["of"] == mixed["held_out"] else ", those of lowest hash, were looked at:")
    out = [f"documents without text: {card['empty']:,}", f"what could not be read: {card['bad']:,}",
           f"documents that were split because they have more than {card['options']['max_document']:,} characters: {card['split_documents']:,}"]
    if gone["removed"]:
        out = [f"exact copies of an earlier document: {_told(gone['exact'])}",
               f"near copies, whose shingles ({SHINGLE} words, or {SHINGLE} characters of Hangul, Han and Kana) are those of an earlier document "
               f"to 0.8 (Jaccard): {_told(gone['near'])}", "each of them is named in duplicates.jsonl, beside the document that is kept", *out]
    else:
        out = ["duplicates were not looked for (`--no-dedup`)", *out]
    return "\n\n".join([
        f"# {name}",
        f"A corpus of {count(card['tokens'])} tokens: {card['documents']:,} documents, {size(card['bytes'])} of text, {card['bytes_per_token']:.2f} "
        "bytes a token. Built by `hanok corpus build`; card.json says the same, and more, to machines.",
        markdown_table(("side", "documents", "bytes", "tokens"), sides, align="lrrr"),
        f"```\nhanok pretrain {here} --out runs/mine\n```",
        "## What was left out\n\n" + "\n".join(f"- {line}" for line in out),
        f"## Validation\n\nA document's side follows from a hash of its text; {100 * card['options']['validation']:g} % are held out. Of {of} "
        f"{mixed['documents']:,} have {mixed['ngram_words']} words in a row ({mixed['ngram_characters']} characters of Hangul, Han and Kana) that "
        "stand in the training text too.",
        "## Scripts\n\nShares of the letters: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in card["scripts"].items()) + ".",
        f"## Sources\n\n{markdown_table(('source', 'kind', 'bytes', 'SHA-256'), sources[:50], align='llrl')}"
        + (f"\n\nand {len(sources) - 50:,} more in card.json" if len(sources) > 50 else ""),
        f"## Tokenizer\n\n{card['vocab_size']:,} tokens, tokenizer.json, SHA-256 `{card['tokenizer_sha256'][:16]}`.",
    ]) + "\n"


def _two(sums: np.ndarray) -> dict[str, int]:
    return {"documents": int(sums[0]), "bytes": int(sums[1])}


def _told(gone: dict[str, int]) -> str:
    return f"{gone['documents']:,} documents, {size(gone['bytes'])}"
