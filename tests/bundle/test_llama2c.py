"""llama2.c's files, written here byte by byte: the same logits as its forward in plain loops, and the same ids as SentencePiece."""
from __future__ import annotations

import io
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.bundle.bundle import load_bundle, save_bundle
from hanok.bundle.imports import load_any, read_tokenizer
from hanok.bundle.llama2c import tokenizer_from_llama2c
from hanok.contracts import Batch
from hanok.errors import HanokError, TokenizerError, WeightsError

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = SIZES = 32, 48, 2, 4, 2, 96, 16
MAGIC = b"24ka"
IDS = [3, 17, 95, 4, 4, 60, 8, 9, 1, 2]
NAMES = "token attn_norm wq wk wv wo ffn_norm w1 w2 w3 norm".split()


def weights(tied: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """A model as llama2.c names its parts; what stands once a layer has the layers first."""
    draw = np.random.default_rng(seed)
    kv_dim = DIM // HEADS * KV_HEADS
    shapes = {"token": (VOCAB, DIM), "attn_norm": (LAYERS, DIM), "wq": (LAYERS, DIM, DIM), "wk": (LAYERS, kv_dim, DIM), "wv": (LAYERS, kv_dim, DIM),
              "wo": (LAYERS, DIM, DIM), "ffn_norm": (LAYERS, DIM), "w1": (LAYERS, HIDDEN, DIM), "w2": (LAYERS, DIM, HIDDEN),
              "w3": (LAYERS, HIDDEN, DIM), "norm": (DIM,), "head": (VOCAB, DIM)}
    parts = {name: (draw.standard_normal(shape) * 0.5).astype("<f4") for name, shape in shapes.items()}
    return parts | {"head": parts["token"]} if tied else parts


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / math.sqrt(float(x @ x) / len(x) + 1e-5)


def turned(x: np.ndarray, position: int) -> np.ndarray:
    """Neighbouring numbers of each head, turned as run.c turns them."""
    out, width = x.copy(), DIM // HEADS
    for i in range(0, len(x), 2):
        angle = position / 10_000.0 ** ((i % width) / width)
        out[i] = x[i] * math.cos(angle) - x[i + 1] * math.sin(angle)
        out[i + 1] = x[i] * math.sin(angle) + x[i + 1] * math.cos(angle)
    return out


def forward(w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits of each position, one token at a time, in double precision."""
    w = {name: part.astype(np.float64) for name, part in w.items()}
    width, keys, values, logits = DIM // HEADS, [[] for _ in range(LAYERS)], [[] for _ in range(LAYERS)], []
    for position, token in enumerate(ids):
        x = w["token"][token]
        for layer in range(LAYERS):
            h = rms(x, w["attn_norm"][layer])
            q = turned(w["wq"][layer] @ h, position)
            keys[layer].append(turned(w["wk"][layer] @ h, position))
            values[layer].append(w["wv"][layer] @ h)
            heads = []
            for head in range(HEADS):
                own, shared = slice(head * width, (head + 1) * width), head // (HEADS // KV_HEADS) * width
                scores = np.array([q[own] @ k[shared:shared + width] / math.sqrt(width) for k in keys[layer]])
                attention = np.exp(scores - scores.max())
                attention /= attention.sum()
                heads.append(sum(a * v[shared:shared + width] for a, v in zip(attention, values[layer])))
            x = x + w["wo"][layer] @ np.concatenate(heads)
            h = rms(x, w["ffn_norm"][layer])
            gate = w["w1"][layer] @ h
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ h))
        logits.append(w["head"] @ rms(x, w["norm"]))
    return np.array(logits)


def older(w: dict[str, np.ndarray], tied: bool) -> bytes:
    """Version 0: seven sizes, the parts, two tables of rotary that nobody reads, and the head where it is not tied."""
    head = struct.pack("<7i", *SIZES[:5], VOCAB if tied else -VOCAB, CONTEXT)
    table = np.full(CONTEXT * (DIM // HEADS), np.nan, "<f4")
    return head + b"".join(w[name].tobytes() for name in NAMES) + table.tobytes() + (b"" if tied else w["head"].tobytes())


def header(version: int, tied: bool, group: int = 0) -> bytes:
    return (MAGIC + struct.pack("<i7iB", version, *SIZES, tied) + (struct.pack("<i", group) if group else b"")).ljust(256, b"\0")


LATER = "token wq wk wv wo w1 w2 w3".split()


def first(w: dict[str, np.ndarray], tied: bool) -> bytes:
    """Version 1: a header of 256 bytes, the norms, the matrices."""
    return header(1, tied) + b"".join(w[name].tobytes() for name in ["attn_norm", "ffn_norm", "norm", *LATER, *([] if tied else ["head"])])


def second(w: dict[str, np.ndarray], tied: bool, group: int = 16) -> tuple[bytes, dict[str, np.ndarray]]:
    """Version 2, and the weights that it holds: each matrix as int8 with a scale for each group."""
    data, held = header(2, tied, group) + b"".join(w[name].tobytes() for name in ("attn_norm", "ffn_norm", "norm")), dict(w)
    for name in [*LATER, *([] if tied else ["head"])]:
        matrices = w[name].reshape(-1, *w[name].shape[-2:])
        read = []
        for matrix in matrices:
            groups = matrix.reshape(-1, group)
            scale = (np.abs(groups).max(1) / 127).astype("<f4")
            whole = np.round(groups / scale[:, None]).astype("i1")
            data += whole.tobytes() + scale.tobytes()
            read.append(whole * scale[:, None])
        held[name] = np.stack(read).reshape(w[name].shape)
    return data, held | ({"head": held["token"]} if tied else {})


def loaded(path: Path, data: bytes):
    path.write_bytes(data)
    return load_any(path)


def assert_same_logits(bundle, w: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        ours = bundle.model(Batch(torch.tensor([IDS])))[0]
    torch.testing.assert_close(ours, torch.from_numpy(forward(w, IDS)).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_the_logits_are_llama2cs(tmp_path, version, tied):
    w = weights(tied)
    data, w = ((older(w, tied), w), (first(w, tied), w), second(w, tied))[version]
    bundle = loaded(tmp_path / "model.bin", data)
    assert_same_logits(bundle, w)
    config = bundle.config
    assert (bundle.family.name, config.tie_embeddings, config.norm_eps, config.max_seq_len) == ("llama", tied, 1e-5, CONTEXT)
    assert bundle.generation.stop_ids == (1, 2) and bundle.manifest["parent"]["version"] == version


def test_reading_and_saving_leave_the_file_alone(tmp_path):
    w = weights(True)
    bundle = loaded(tmp_path / "model.bin", older(w, True))
    with torch.no_grad():
        next(bundle.model.parameters()).zero_()          # of a private map
    assert (tmp_path / "model.bin").read_bytes() == older(w, True)
    save_bundle(load_any(tmp_path / "model.bin"), tmp_path / "out")
    assert_same_logits(load_bundle(tmp_path / "out"), w)


# ---- what is refused

def refused(path: Path, data: bytes) -> str:
    with pytest.raises(HanokError) as told:
        loaded(path, data)
    assert isinstance(told.value, WeightsError) and "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("write", [older, first, lambda w, tied: second(w, tied)[0]])
@pytest.mark.parametrize("change", [-1, -4000, 4])
def test_a_length_that_does_not_fit_is_told_in_bytes(tmp_path, write, change):
    whole = write(weights(True), True)
    data = whole[:change] if change < 0 else whole + bytes(change)
    assert f"model.bin has {len(data)} bytes, expected {len(whole)} for a llama2.c model" in refused(tmp_path / "model.bin", data)


@pytest.mark.parametrize("at", range(4))
def test_sizes_that_are_too_large_are_told_before_anything_is_made(tmp_path, at):
    sizes = [*SIZES]
    sizes[at + (at > 2)] = 2 ** 30                       # dim, hidden_dim, n_layers or n_kv_heads
    told = refused(tmp_path / "model.bin", struct.pack("<7i", *sizes) + bytes(1000))
    assert "has 1028 bytes, expected" in told or "do not fit together" in told


@pytest.mark.parametrize(("data", "told"), [
    (b"", "header says dim 0, hidden_dim 0"),
    (b"some text that is no model at all", "is no llama2.c model: its header says dim"),
    (struct.pack("<7i", 32, 48, 2, 5, 5, 96, 16), "dim 32, hidden_dim 48, n_layers 2, n_heads 5, n_kv_heads 5"),
    (struct.pack("<7i", 32, 48, 2, 4, 3, 96, 16), "n_heads 4, n_kv_heads 3"),
    (MAGIC + struct.pack("<i7iB", 1, 32, 48, 2, 4, 2, -96, 16, 1), "vocab_size -96"),
    (MAGIC + struct.pack("<i7iBi", 2, *SIZES, 1, 0), "do not fit together"),
    (MAGIC + struct.pack("<i7iBi", 2, *SIZES, 1, 24), "do not fit together"),
    (MAGIC + struct.pack("<i7i", 3, *SIZES), "is a llama2.c file of version 3, expected 1 or 2"),
    (b"PK\x03\x04 an archive of torch", "model.bin is a pickle, which can run code when it is read"),
    (b"\x80\x02.", "model.bin is a pickle, which can run code when it is read"),
])
def test_other_files_are_refused(tmp_path, data, told):
    assert told in refused(tmp_path / "model.bin", data)


def test_a_width_that_looks_like_a_pickle_is_none(tmp_path):
    data = struct.pack("<7i", 640, 48, 2, 4, 2, 96, 16)
    assert data.startswith(b"\x80\x02")
    assert "has 28 bytes, expected" in refused(tmp_path / "model.bin", data)


# ---- tokenizer.bin

TEXTS = ["the quick brown fox jumps over the lazy dog, and the dog doesn't mind 1234 times", "한국의 집은 마루를 가운데 두고 방들이 둘러앉는다.",
         "She said: it's 1234 o'clock 😀 and the café isn't open!\n\n\tprint(x)"] * 3
TEXT = st.one_of(st.text(), st.text("the quick  한국의집은 마루😀1234\n'sé")).filter(lambda text: "▁" not in text and "\0" not in text)


def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    """Trained as Llama 2's was."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def tokens_of(model: sentencepiece.SentencePieceProcessor, raw_bytes: bool) -> list[tuple[float, bytes]]:
    """Scores and bytes as llama2.c's tokenizer.py writes them; earlier it wrote each byte token as the character of that number."""
    spelled = {1: "\n<s>\n", 2: "\n</s>\n"} | ({3 + byte: chr(byte) for byte in range(256)} if raw_bytes else {})
    pieces = (spelled.get(n, model.id_to_piece(n)).replace("▁", " ").encode() for n in range(model.get_piece_size()))
    return [(model.get_score(n), piece) for n, piece in enumerate(pieces)]


def written(tokens: list[tuple[float, bytes]]) -> bytes:
    entries = b"".join(struct.pack("<fi", score, len(piece)) + piece for score, piece in tokens)
    return struct.pack("<i", max(len(piece) for _, piece in tokens)) + entries


SPM = sentencepiece_model()
READ = [tokenizer_from_llama2c(written(tokens_of(SPM, raw_bytes))) for raw_bytes in (False, True)]


@pytest.mark.parametrize("ours", READ, ids=["spelled", "raw"])
@settings(deadline=None)
@given(text=TEXT)
def test_the_ids_are_sentencepieces(ours, text):
    ids = ours.encode(text)
    assert ids == SPM.encode(text)
    assert ours.decode(ids) == text
    assert ours.encode(text, add_special=True) == [1, *ids]


def test_the_ends_are_special_and_the_rest_is_not():
    assert READ[0].specials == {"<unk>": 0, "<s>": 1, "</s>": 2} and READ[0].vocab_size == 400
    assert READ[0].encode("</s>") == SPM.encode("</s>") and READ[0].encode("</s>", parse_special=True) == [2]


def test_a_model_takes_its_tokenizer(tmp_path):
    (tmp_path / "tokenizer.bin").write_bytes(written(tokens_of(SPM, False)))
    sizes = dict(zip("dim hidden layers heads kv vocab context".split(), SIZES)) | {"vocab": 400}
    w = weights(True) | {"token": np.random.default_rng(1).standard_normal((400, DIM)).astype("<f4")}
    (tmp_path / "model.bin").write_bytes(struct.pack("<7i", *sizes.values()) + older(w, True)[28:])
    bundle = load_any(tmp_path / "model.bin", read_tokenizer(tmp_path / "tokenizer.bin"))
    assert bundle.tokenizer.encode(TEXTS[0]) == SPM.encode(TEXTS[0])
    assert bundle.generation.add_special and bundle.generation.stop_ids == (1, 2)


@pytest.mark.parametrize(("change", "told"), [
    (lambda data: data[:-1], "token 399 of"), (lambda data: data[:2000], "the file at 2000"), (lambda data: data + b"\0", "token 400 of 0 bytes"),
    (lambda data: b"", "0 tokens that do not begin with <unk>"), (lambda data: data[:4 + 8 + 5], "1 tokens that do not begin"),
    (lambda data: data.replace(b"\n<s>\n", b"\n<x>\n"), "400 tokens that do not begin"),
    (lambda data: data[:8] + struct.pack("<i", -9) + data[12:], "token 0 of -9 bytes"),
])
def test_a_broken_tokenizer_is_told_in_one_line(tmp_path, change, told):
    (tmp_path / "tokenizer.bin").write_bytes(change(written(tokens_of(SPM, False))))
    with pytest.raises(TokenizerError) as raised:
        read_tokenizer(tmp_path / "tokenizer.bin")
    assert told in str(raised.value) and "\n" not in str(raised.value)
