"""GGUF files as llama.cpp's converter writes them, read back to the same logits, quantised, cut, bent and forged."""
from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import gpt2_metadata_of, gpt2_tensors_of, tensors_of, words_of, write, written
from hypothesis import given, settings
from hypothesis import strategies as st

from hanok.bundle.bundle import load_bundle, save_bundle
from hanok.bundle.gguf import open_gguf, read_gguf
from hanok.bundle.imports import import_gguf, load_any
from hanok.bundle.weights import parameters
from hanok.contracts import Batch
from hanok.disk import sha256
from hanok.errors import ConfigError, DataError, HanokError, TokenizerError, WeightsError
from hanok.generate.search import greedy
from hanok.models.llama import LlamaConfig
from tiny import CONFIG, WORDS, model, prose, tokenizer
from zoo import BY_NAME, V

WIDE = LlamaConfig(V, 256, 1, 4, 2, 256, 64, d_head=64)
IDS = torch.arange(2, 26).view(2, 12)


def logits(net: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(Batch(IDS))


def refused(error: type[HanokError], path: Path) -> str:
    with pytest.raises(error) as told:
        import_gguf(path)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.fixture
def broken(tmp_path):
    """broken(metadata=..., tensors=...) is a Llama of one changed thing."""
    case = BY_NAME["llama"]
    net = case.build()
    return lambda **changes: written(tmp_path / "x.gguf", net, case.config, **changes)


# ---- the same logits

CASES = {name: BY_NAME[name].config for name in ("llama", "llama-tied", "llama-linear-rope", "llama-llama3-rope", "qwen3", "qwen2", "qwen2-tied")} | {
    "llama-many-heads": replace(BY_NAME["llama"].config, n_kv_heads=4), "llama-no-head-width": replace(BY_NAME["llama"].config, d_head=None)}


@pytest.mark.parametrize("name", CASES)
def test_fp32_gives_the_same_logits_and_the_same_bundle(name, tmp_path):
    config, arch = CASES[name], name.split("-")[0]
    net = model(config, arch)
    bundle = import_gguf(written(tmp_path / "x.gguf", net, config, arch))
    assert bundle.family.name == arch and not bundle.model.training
    read = replace(bundle.config, norm_eps=config.norm_eps, d_head=config.d_head, rope_scaling=config.rope_scaling)
    assert read == config and bundle.config.norm_eps == pytest.approx(config.norm_eps) and bundle.config.rope_scaling == config.rope_scaling
    assert all(torch.equal(ours, parameters(net)[name]) for name, ours in parameters(bundle.model).items())
    assert (logits(bundle.model) - logits(net)).abs().max() <= 1e-6
    assert greedy(bundle.model, [[5, 6], [7, 8, 9]], 10) == greedy(net, [[5, 6], [7, 8, 9]], 10)
    again = load_bundle(save_bundle(bundle, tmp_path / "out"))
    assert torch.equal(logits(again.model), logits(bundle.model))


@pytest.mark.parametrize(("name", "permuted"), [("llama", False), ("qwen3", True), ("qwen2", True)])
def test_rows_in_the_other_order_would_give_other_logits(name, permuted, tmp_path):
    """What makes the permutation necessary for llama, and wrong for Qwen."""
    config = CASES[name]
    net = model(config, name)
    wrong = import_gguf(written(tmp_path / "x.gguf", net, config, name, permuted=permuted))
    assert (logits(wrong.model) - logits(net)).abs().max() > 0.05


def test_a_llama_with_a_window_is_a_mistral(tmp_path):
    case = BY_NAME["mistral"]
    net = case.build()
    bundle = import_gguf(written(tmp_path / "x.gguf", net, case.config, "llama", metadata={"llama.attention.sliding_window": 5}))
    assert bundle.family.name == "mistral" and replace(bundle.config, norm_eps=case.config.norm_eps) == case.config
    assert torch.equal(logits(bundle.model), logits(net))
    plain = import_gguf(written(tmp_path / "plain.gguf", net, case.config, "llama"))
    assert plain.family.name == "llama"
    differ = (logits(plain.model) - logits(net)).abs()
    assert differ[:, :5].max() <= 1e-6 and differ[:, 5:].max() > 0.05


@pytest.mark.parametrize("head", ["tied", "repeated", "own"])
def test_gpt2_is_read_with_q_k_and_v_in_one(head, tmp_path):
    """Older files repeat the embedding as their head."""
    config = replace(BY_NAME["gpt2"].config, tie_embeddings=head != "own")
    net = model(config, "gpt2")
    tensors = gpt2_tensors_of(net, config)
    if head == "repeated":
        tensors["output.weight"] = tensors["token_embd.weight"]
    bundle = import_gguf(write(tmp_path / "x.gguf", "gpt2", gpt2_metadata_of(config), tensors))
    assert bundle.family.name == "gpt2" and replace(bundle.config, norm_eps=config.norm_eps) == config
    assert all(torch.equal(ours, parameters(net)[name]) for name, ours in parameters(bundle.model).items())
    assert torch.equal(logits(bundle.model), logits(net))


@pytest.mark.parametrize(("tensors", "told"), [
    ({"blk.0.attn_qkv.bias": None}, "tensor 'blk.0.attn_qkv.bias' is missing"),
    ({"blk.0.attn_qkv.weight": np.ones((95, 32), np.float32)}, "has shape (31, 32), the config wants (32, 32)"),
    ({"position_embd.weight": np.ones((63, 32), np.float32)}, "'embed.position.table.weight' has shape (63, 32), the config wants (64, 32)"),
])
def test_a_gpt2_that_does_not_fit_is_told(tensors, told, tmp_path):
    config = BY_NAME["gpt2"].config
    made = gpt2_tensors_of(model(config, "gpt2"), config) | tensors
    path = write(tmp_path / "x.gguf", "gpt2", gpt2_metadata_of(config), {name: tensor for name, tensor in made.items() if tensor is not None})
    assert told in refused(WeightsError, path)


def quantised(array: np.ndarray, kind: Type) -> np.ndarray:
    """The array in blocks; for the k-quants, which the package only reads, any blocks with scales of a sensible size."""
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        length, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = np.random.default_rng(array.size).integers(0, 256, (array.size // length, size), np.uint8)
        scales = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,)}[kind]
        for place in scales:
            blocks[:, place:place + 2] = np.frombuffer(np.float16(2e-4).tobytes(), np.uint8)
        return blocks.reshape(array.shape[0], -1)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q2_K, Type.Q3_K, Type.Q4_K,
                                  Type.Q5_K, Type.Q6_K, Type.TQ1_0, Type.TQ2_0, Type.MXFP4], ids=lambda kind: kind.name)
def test_quantised_weights_are_what_the_package_makes_of_them(kind, tmp_path):
    net = model(WIDE)
    tensors = {name: (quantised(array, kind), kind) for name, array in tensors_of(net, WIDE, True).items() if array.ndim == 2}
    bundle = import_gguf(written(tmp_path / "x.gguf", net, WIDE, tensors=tensors))
    plain = {name: gguf.quants.dequantize(*pair) for name, pair in tensors.items()}
    expected = import_gguf(written(tmp_path / "plain.gguf", net, WIDE, tensors=plain))
    assert all(p.dtype == torch.float32 for p in bundle.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(bundle.model.parameters(), expected.model.parameters(), strict=True))
    got = logits(bundle.model)
    assert torch.equal(got, logits(expected.model)) and got.isfinite().all()
    if kind in (Type.F16, Type.BF16, Type.Q8_0, Type.Q5_0, Type.Q5_1):
        assert torch.nn.functional.cosine_similarity(got, logits(net), dim=-1).min() > 0.9


def test_q8_is_scale_times_integer(tmp_path):
    """The format read in plain loops: blocks of 32, a half-precision scale and 32 signed bytes each."""
    config = replace(WIDE, d_model=64, d_head=16, d_ff=96)
    net = model(config)
    array = parameters(net)["stack.blocks.0.ffn.up.weight"].detach().numpy()
    packed = gguf.quants.quantize(array, Type.Q8_0)
    expected = np.zeros_like(array)
    for row in range(array.shape[0]):
        for block in range(array.shape[1] // 32):
            data = packed[row, 34 * block:34 * (block + 1)].tobytes()
            scale = np.frombuffer(data[:2], np.float16)[0].astype(np.float32)
            for i in range(32):
                expected[row, 32 * block + i] = scale * (data[2 + i] - 256 * (data[2 + i] > 127))
    bundle = import_gguf(written(tmp_path / "x.gguf", net, config, tensors={"blk.0.ffn_up.weight": (packed, Type.Q8_0)}))
    assert np.array_equal(bundle.model.stack.blocks[0].ffn.up.weight.detach().numpy(), expected)


def test_a_type_that_the_package_cannot_read_is_told(broken):
    path = broken(tensors={"output_norm.weight": np.ones(32, np.float64)})
    assert "'output_norm.weight' has type F64, which the gguf package cannot dequantise; fetch another quantisation, for example Q8_0" in refused(
        WeightsError, path)


# ---- what else is in the file

def test_the_vocabulary_becomes_the_tokenizer_and_its_ends_the_stop_ids(tmp_path):
    words = tokenizer()
    config = replace(CONFIG, vocab_size=words.vocab_size + 3)                         # rows may be padded
    path = written(tmp_path / "tiny-model.gguf", model(config), config, metadata=words_of(words) | {
        "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.padding_token_id": 5, "tokenizer.chat_template": "{{ messages }}",
        "general.license": "apache-2.0", "general.name": "Tiny 누가", "general.quantization_version": 2, "general.file_type": 0,
        "general.alignment": 64, "quantize.imatrix.file": "x.dat", "general.tags": ["a", "b"], "general.base_model.0.repo_url": "x"})
    bundle = import_gguf(path)
    for text in (prose(50, seed=3), "x<|endoftext|>y", ""):
        assert bundle.tokenizer.encode(text, parse_special=True) == words.encode(text, parse_special=True)
        assert bundle.tokenizer.encode(text) == words.encode(text)
    assert bundle.generation.stop_ids == (words.id_of("<|endoftext|>"), 7) and bundle.generation.pad_id == 5 and not bundle.generation.add_special
    assert bundle.chat_template == "{{ messages }}" and bundle.manifest["licence"] == "apache-2.0"
    assert bundle.manifest["parent"] == {"format": "gguf", "name": "Tiny 누가", "sha256": sha256(path)}
    card = (save_bundle(bundle, tmp_path / "out") / "README.md").read_text()
    assert "license: apache-2.0" in card and sha256(path) in card
    assert load_any(tmp_path / "out").tokenizer.encode(WORDS[4]) == words.encode(WORDS[4])


def test_a_beginning_that_the_file_asks_for_is_added(tmp_path):
    """Llama reads nothing without its first token: the file says so, and a Hugging Face folder of the same model says it too."""
    words = tokenizer()
    told = words_of(words) | {"tokenizer.ggml.bos_token_id": 9, "tokenizer.ggml.add_bos_token": True}
    bundle = import_gguf(written(tmp_path / "x.gguf", model(), CONFIG, metadata=told))
    assert bundle.generation.add_special and bundle.tokenizer.encode("the", add_special=True)[0] == 9


def test_a_file_without_words_or_name_is_a_model_still(tmp_path):
    path = written(tmp_path / "plain.gguf", model(), CONFIG)
    bundle = import_gguf(path)
    assert bundle.tokenizer is None and bundle.chat_template is None and bundle.generation.stop_ids == () and "licence" not in bundle.manifest
    assert bundle.manifest["parent"]["name"] == "plain"
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "plain.gguf")
    assert load_any(tmp_path / "folder").manifest["parent"]["name"] == "plain"


@pytest.mark.parametrize(("change", "told"), [
    ({"tokenizer.ggml.model": "bert"}, "GGUF tokenizer model 'bert' is not supported"), ({"tokenizer.ggml.pre": "qwen3"}, "did you mean 'qwen2'?"),
    ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id is 9999, but the GGUF metadata has"), ({"tokenizer.ggml.merges": None}, "has no"),
])
def test_a_vocabulary_that_is_not_understood_is_told(change, told, tmp_path):
    assert told in refused(TokenizerError, written(tmp_path / "x.gguf", model(), CONFIG, metadata=words_of(tokenizer()) | change))


def test_more_words_than_rows_are_refused(tmp_path):
    case = BY_NAME["llama"]
    path = written(tmp_path / "x.gguf", case.build(), case.config, metadata=words_of(tokenizer()))
    assert f"the tokenizer has {tokenizer().vocab_size} tokens, the model knows 97" in refused(ConfigError, path)


# ---- what is not understood

@pytest.mark.parametrize(("metadata", "told"), [
    ({"llama.attention.scale": 2.0}, "'llama.attention.scale' = 2.0 is not known for llama; hanok would not compute the same logits"),
    ({"llama.attention.sliding_window": 0}, "window is 0; expected 1 or more"), ({"llama.attention.sliding_window": "x"}, "window: got 'x'"),
    ({"llama.expert_count": 8}, "'llama.expert_count' = 8 is not known"), ({"adapter.type": "lora"}, "'adapter.type' is not known"),
    ({"llama.block_count": 2 ** 31}, "it tells of 2147483648 layers and holds 30 tensors"),
    ({"llama.block_count": None}, "'llama.block_count' is missing; every llama has one"), ({"llama.block_count": "x"}, "n_layers: got 'x', expected"),
    ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn' is not supported; choose from none, linear"),
    ({"llama.rope.scaling.type": "linear"}, "metadata does not fit together (KeyError: 'rope.scaling.factor')"),
    ({"llama.rope.dimension_count": 4}, "rotary over part of a head"), ({"llama.attention.value_length": 16}, "values of another width than keys"),
    ({"llama.attention.head_count": 0, "llama.attention.key_length": None}, "does not fit together (ZeroDivisionError"),
    ({"llama.attention.head_count": [4, 4, 4]}, "n_heads: got [4, 4, 4], expected a whole number"),
    ({"llama.attention.head_count": [4, 4, 4], "llama.attention.key_length": None}, "metadata does not fit together (TypeError"),
    ({"llama.attention.head_count_kv": 3}, "n_heads 4 is not divisible by n_kv_heads 3|does not fit the file's sizes"),
])
def test_metadata_that_is_not_understood_is_named(broken, metadata, told):
    message = refused(HanokError, broken(metadata=metadata))
    assert any(part in message for part in told.split("|")), message


def test_an_architecture_without_family_is_named(tmp_path):
    path = write(tmp_path / "x.gguf", "mamba", {"mamba.block_count": 2}, {"token_embd.weight": np.ones((97, 32), np.float32)})
    assert "architecture 'mamba' has no family here; known are gpt2, llama, qwen2, qwen3" in refused(ConfigError, path)


@pytest.mark.parametrize(("tensors", "told"), [
    ({"blk.1.ffn_up.weight": None}, "tensor 'blk.1.ffn_up.weight' is missing; is the file complete?"),
    ({"token_embd.weight": None}, "tensor 'token_embd.weight' is missing"), ({"blk.2.attn_q.weight": None}, "'blk.2.attn_q.weight' is missing"),
    ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, "tensor 'blk.0.attn_q.bias' has no place in llama; hanok would drop it"),
    ({"blk.3.attn_q.weight": np.ones((32, 32), np.float32)}, "tensor 'blk.3.attn_q.weight' has no place"),
    ({"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}, "tensor 'blk.0.attn_q_norm.weight' has no place"),
    ({"blk.0.ffn_up.weight": np.ones((64, 31), np.float32)}, "'stack.blocks.0.ffn.up.weight' has shape (64, 31), the config wants (64, 32)"),
    ({"blk.0.attn_q.weight": np.ones((31, 32), np.float32)}, "tensor 'blk.0.attn_q.weight' (31, 32) does not fit the file's sizes"),
    ({"token_embd.weight": np.ones(97, np.float32)}, "(97,)"), ({"rope_freqs.weight": np.ones(3, np.float32)}, "does not fit together (ValueError"),
    ({"rope_freqs.weight": np.array([1, 2, 3, 8], np.float32)}, "rope_freqs.weight follows no rule known here"),
    ({"rope_freqs.weight": np.zeros(4, np.float32)}, "metadata does not fit together (ZeroDivisionError|follows no rule"),
    ({"output.weight": np.ones((98, 32), np.float32)}, "'head.weight' has shape (98, 32), the config wants (97, 32)"),
])
def test_tensors_that_do_not_fit_are_named(broken, tensors, told):
    message = refused(HanokError, broken(tensors=tensors))
    assert any(part in message for part in told.split("|")) and "x.gguf" in message, message


def test_what_is_no_gguf_is_told(tmp_path):
    for content in (b"", b"GG", b"GGML" + b"\0" * 99, b"{}"):
        (tmp_path / "x.gguf").write_bytes(content)
        assert f"is not a GGUF file: it begins with {content[:4]!r}, expected b'GGUF'" in refused(WeightsError, tmp_path / "x.gguf")
    with pytest.raises(DataError, match="there is no such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(DataError, match="this is a folder; a file was expected"):
        read_gguf(tmp_path)


def test_another_byte_order_is_told(tmp_path):
    """Read as they are, its numbers would be noise."""
    path = written(tmp_path / "x.gguf", model(), CONFIG, endianess=gguf.GGUFEndian.BIG)
    assert "for machines with the other byte order (big-endian), expected 2 or 3; fetch a usual one" in refused(WeightsError, path)


# ---- cut and bent

@pytest.fixture(scope="module")
def whole() -> Iterator[tuple[Path, bytes, int, int]]:
    """A folder, a file's bytes, and where its tensors begin and end."""
    config = LlamaConfig(12, 8, 1, 2, 1, 8, 16, d_head=4)
    with tempfile.TemporaryDirectory() as folder:
        more = {"tokenizer.ggml.tokens": list("abcdefgh"), "general.license": "mit"}
        path = written(Path(folder) / "whole.gguf", model(config), config, metadata=more)
        reader = gguf.GGUFReader(path)
        ends = [tensor.data_offset + tensor.n_bytes for tensor in reader.tensors]
        yield Path(folder), path.read_bytes(), reader.data_offset, max(ends)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused_in_one_line(whole, data):
    folder, content, start, end = whole
    n = data.draw(st.integers(0, end - 1) | st.integers(start - 8, start + 64) | st.integers(end - 40, end - 1))
    (folder / "cut.gguf").write_bytes(content[:n])
    message = refused(WeightsError, folder / "cut.gguf")
    assert "fetch it again" in message or "is not a GGUF file" in message


def text(content: str | bytes) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(data)) + data


def head(*, version: int = 3, tensors: tuple[bytes, ...] = (), values: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    n_tensors, n_values = counts or (len(tensors), len(values))
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + b"".join(values) + b"".join(tensors) + b"\0" * 256


def value(kind: int, data: bytes, name: str = "general.x") -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def entry(dims: tuple[int, ...], kind: int = 0, offset: int = 0, n_dims: int | None = None, name: str = "token_embd.weight") -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims) if n_dims is None else n_dims, *dims, kind, offset)


def listed(kind: int, n: int, times: int = 1) -> bytes:
    return head(values=(value(9, struct.pack("<IQ", kind, n) * times),))


FORGED = {
    "is a GGUF of version 1, expected 2 or 3": head(version=1),
    "is a GGUF of version 0, expected 2 or 3": head(version=0),
    "is a GGUF of version 50331648 for machines with the other byte order": head(version=3 << 24),
    "'' stands there twice": head(counts=(0, 2 ** 60)),
    "(ValueError: '' has the sizes": head(counts=(1, 0)),
    "1152921504606846976 bytes are promised at byte 57, the file ends at": listed(0, 2 ** 60),
    "73786976294838206464 bytes are promised": listed(12, 2 ** 63),
    "a list of 72057594037927936 values of type 8": listed(8, 2 ** 56),
    "a list of 72057594037927936 values of type 9": listed(9, 2 ** 56),
    "a list of 1 values of type 77": listed(77, 1),
    "RecursionError": listed(9, 1, 5000),
    "KeyError: 77": head(values=(value(77, b""),)),
    "9223372036854775808 bytes are promised": head(values=(value(8, struct.pack("<Q", 2 ** 63)),)),
    "UnicodeDecodeError": head(values=(value(8, text(b"\xff")),)),
    "'general.x' stands there twice": head(values=(value(8, text("a")), value(8, text("b")))),
    "general.alignment is 0": head(values=(value(4, struct.pack("<I", 0), "general.alignment"),)),
    "general.alignment is 'x'": head(values=(value(8, text("x"), "general.alignment"),)),
    "'token_embd.weight' stands there twice": head(tensors=(entry((4, 2)), entry((4, 2)))),
    "has the sizes () in blocks of 1": head(tensors=(entry(()),)),
    "has the sizes (4, 0)": head(tensors=(entry((4, 0)),)),
    "has the sizes (0, 1152921504606846976)": head(tensors=(entry((0, 2 ** 60), 2),)),
    "has the sizes (4, 4) in blocks of 32": head(tensors=(entry((4, 4), 2),)),
    "17179869184 bytes are promised": head(tensors=(entry((4,), n_dims=2 ** 31),)),
    "has type number 9999, which the gguf package does not know; fetch another quantisation": head(tensors=(entry((4, 2), 9999),)),
    "'token_embd.weight' ends at byte 9223372036854775": head(tensors=(entry((4, 2), offset=2 ** 63),)),
    "'token_embd.weight' ends at byte 4835703278458516698824": head(tensors=(entry((2 ** 40, 2 ** 40)),)),
}


@pytest.mark.parametrize("told", FORGED)
def test_a_forged_head_is_refused_before_it_costs_anything(told, tmp_path):
    (tmp_path / "x.gguf").write_bytes(FORGED[told])
    message = refused(WeightsError, tmp_path / "x.gguf")
    assert told in message and len(message) < 400


@pytest.mark.parametrize("name", CASES)
def test_the_head_is_read_as_the_package_reads_it(name, tmp_path):
    config, arch = CASES[name], name.split("-")[0]
    more = words_of(tokenizer()) | {"general.x": [True, False], "general.y": [1.5, 2.5], "general.z": [-1, 2], "general.none": "", "general.on": True}
    path = written(tmp_path / "x.gguf", model(config, arch), config, arch, metadata=more)
    metadata, tensors = open_gguf(path)
    package = gguf.GGUFReader(path)
    assert metadata == {key: field.contents() for key, field in package.fields.items() if not key.startswith("GGUF.")}
    assert list(tensors) == [tensor.name for tensor in package.tensors]
    for tensor in package.tensors:
        assert np.array_equal(tensors[tensor.name].numpy(), tensor.data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_file_with_a_bent_head_is_refused_in_one_line_or_read(whole, data):
    folder, content, start, _ = whole
    bent = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        bent[data.draw(st.integers(0, start - 1))] = data.draw(st.sampled_from([0, 1, 255, 127, 128, 10]) | st.integers(0, 255))
    (folder / "bent.gguf").write_bytes(bent)
    try:
        import_gguf(folder / "bent.gguf")
    except HanokError as error:
        assert "\n" not in str(error)
