"""SmolLM2-135M in fp32 on this CPU: greedy decoding at 1 and 4 rows and prefill of 512 tokens, against `transformers.generate`, in turn.

    python benchmarks/decode.py [--repeats 7] [--threads 2] [--model smollm2-135m-instruct]
"""
from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

import hanok
from common import alternate, seconds
from hanok.bundle.imports import export_folder
from hanok.bundle.pull import pull
from hanok.contracts import Request

N_NEW = 32


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--model", default="smollm2-135m-instruct")
    told = arguments.parse_args()
    torch.set_num_threads(told.threads)
    torch.manual_seed(0)
    ours = hanok.load(pull(told.model))
    with tempfile.TemporaryDirectory() as folder:
        export_folder(ours.bundle, Path(folder) / "hf")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32).eval()
        measure(ours, theirs, told.repeats, told.threads)


def measure(ours: hanok.LoadedModel, theirs, repeats: int, threads: int) -> None:
    vocab_size = ours.config.vocab_size

    def rows(n_rows: int, n_context: int) -> torch.Tensor:
        return torch.randint(100, vocab_size, (n_rows, n_context))

    def our_time(ids: torch.Tensor, n_new: int) -> float:
        requests = [Request(row, max_new_tokens=n_new) for row in ids.tolist()]
        return seconds(lambda: list(ours.run(requests)))

    def their_time(ids: torch.Tensor, n_new: int) -> float:
        return seconds(lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, min_new_tokens=n_new,
                                               do_sample=False, num_beams=1, pad_token_id=0, temperature=None, top_p=None, top_k=None))

    prompt = rows(1, 20)
    with torch.no_grad():
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False,
                                   num_beams=1, pad_token_id=0)[0, 20:].tolist()
    assert list(ours.answers([Request(prompt[0].tolist(), max_new_tokens=12)])[0][0].token_ids) == expected, "the two do not write the same text"
    print(f"SmolLM2-135M fp32, {threads} threads, torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for n_rows, n_context, goal in ((1, 64, 1.25), (4, 64, 1.25), (1, 500, None)):
        def rate(time_of, n_rows=n_rows, n_context=n_context) -> float:
            ids = rows(n_rows, n_context)
            return n_rows * N_NEW / (time_of(ids, N_NEW + 1) - time_of(ids, 1))
        name = f"decode, {n_rows} row{'s' * (n_rows > 1)}, context {n_context}"
        pair = alternate(name, "tokens/s", lambda: rate(our_time), lambda: rate(their_time), repeats)
        print(pair.line(goal), flush=True)

    def prefill(time_of) -> float:
        return 512 / time_of(rows(1, 512), 1)
    print(alternate("prefill, 512 tokens", "tokens/s", lambda: prefill(our_time), lambda: prefill(their_time), repeats).line(1.05), flush=True)


if __name__ == "__main__":
    main()
