"""Our safetensors files against the safetensors package, both ways, and files that are cut, bent or forged: each is a WeightsError of one line."""
from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hanok.bundle.weights import ALIGNMENT, DTYPES, assign, parameters, read_folder, read_safetensors, write_safetensors
from hanok.errors import HanokError, WeightsError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
shapes = st.lists(st.integers(0, 4), max_size=4)
contents = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__"),
                           st.tuples(st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 2 ** 31)), max_size=6)
SAMPLE = {"embed.weight": torch.arange(12.0).view(4, 3), "scale": torch.tensor(7, dtype=torch.int16), "none": torch.empty(0, 5),
          "half": torch.arange(5).bfloat16(), "double": torch.arange(3).double()}


def make(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (bits[..., 0] % 2).bool() if dtype == torch.bool else bits.view(dtype).squeeze(-1)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b) for a, b in ((left[name], right[name]) for name in left))


def header_of(path: Path) -> tuple[dict, int]:
    data = path.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + n]), 8 + n


def forge(path: Path, header: object, body: bytes = b"\0" * 48, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as error:
        read_safetensors(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """One folder for all examples of a property."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ---- equal to the package

@settings(max_examples=60, deadline=None)
@given(contents)
def test_the_package_reads_what_we_write_and_we_what_it_writes(place, told):
    tensors = {name: make(*how) for name, how in told.items()}
    write_safetensors(place / "ours.safetensors", tensors, {"family": "x"})
    assert same(safetensors.torch.load_file(place / "ours.safetensors"), tensors)
    assert same(read_safetensors(place / "ours.safetensors"), tensors)
    safetensors.torch.save_file(tensors, place / "theirs.safetensors", {"format": "pt"})
    assert same(read_safetensors(place / "theirs.safetensors"), tensors)


def test_tensors_lie_in_the_order_given_from_an_aligned_byte_on(tmp_path):
    path = tmp_path / "x.safetensors"
    for n in range(1, 70):                                                            # every length of header
        write_safetensors(path, {"z" * n: torch.ones(3, dtype=torch.uint8), "a": torch.ones(2), "m": torch.ones(1, dtype=torch.bfloat16)}, {"k": "v"})
        header, start = header_of(path)
        assert start % ALIGNMENT == 0 and header["__metadata__"] == {"format": "pt", "k": "v"}
        assert [(name, entry["data_offsets"]) for name, entry in list(header.items())[1:]] == [("z" * n, [0, 3]), ("a", [3, 11]), ("m", [11, 13])]
        assert path.stat().st_size == start + 13
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "k": "v"} and torch.equal(file.get_tensor("a"), torch.ones(2))


def test_views_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    views = {"transposed": base.t(), "strided": base[::2, 1::2], "expanded": torch.tensor(3.0).expand(2, 3), "learnt": nn.Parameter(base[1])}
    write_safetensors(tmp_path / "x.safetensors", views)
    assert same(safetensors.torch.load_file(tmp_path / "x.safetensors"), {name: view.detach().contiguous() for name, view in views.items()})


def test_a_type_that_cannot_be_held_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(WeightsError, match="'wave' has type torch.complex64, which is not written here; convert it to one of F64, F32"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(1), "wave": torch.ones(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())


def test_writing_into_a_loaded_tensor_does_not_reach_the_disk(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, SAMPLE)
    before, loaded = path.read_bytes(), read_safetensors(path)
    path.chmod(0o444)
    for tensor in loaded.values():
        tensor.zero_() if tensor.numel() else None
        tensor.add_(1)
    assert torch.equal(loaded["embed.weight"], torch.ones(4, 3))
    assert path.read_bytes() == before and same(read_safetensors(path), SAMPLE)


def test_nothing_is_copied_of_what_is_aligned(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"q": torch.ones(3, 4), "k": torch.ones(2, 4), "odd": torch.ones(1, dtype=torch.uint8),
                                                   "skewed": torch.ones(2)})
    read = read_safetensors(tmp_path / "x.safetensors")
    assert read["q"].untyped_storage().data_ptr() == read["k"].untyped_storage().data_ptr() != read["skewed"].untyped_storage().data_ptr()
    assert read["k"].data_ptr() == read["q"].data_ptr() + 48 and read["q"].data_ptr() % ALIGNMENT == 0
    assert torch.equal(read["skewed"], torch.ones(2))


# ---- whole or not at all

class Interrupted(Mapping):
    """Tensors of which the third never comes."""

    def __init__(self):
        self.shapes = dict.fromkeys("abcd", (300, 300))

    def __getitem__(self, name):
        return torch.ones(self.shapes[name])

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def values(self):
        for n, name in enumerate(self.shapes):
            if n == 2:
                raise KeyboardInterrupt
            yield self[name]


def test_an_interrupted_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, SAMPLE)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(path, Interrupted())
    assert same(read_safetensors(path), SAMPLE) and list(tmp_path.iterdir()) == [path]


LIMITED = """
import resource, sys, torch
from hanok.bundle.weights import write_safetensors
from hanok.errors import HanokError
for limit in (100, 4096, 300_000, 360_100):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_safetensors(sys.argv[1], {"a": torch.ones(3), "b": torch.ones(300, 300), "c": torch.ones(3)})
    except HanokError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path):
    """It ends in the header, in the last bytes, and between."""
    path = tmp_path / "x.safetensors"
    write_safetensors(path, SAMPLE)
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True)
    line = f"{path}: the file would be larger than this place allows; choose another (nothing was left half-written)"
    assert done.stdout.splitlines() == [line] * 4, done.stderr
    assert same(read_safetensors(path), SAMPLE) and list(tmp_path.iterdir()) == [path]


# ---- cut, bent, forged

@pytest.fixture(scope="module")
def whole(place) -> bytes:
    write_safetensors(place / "whole.safetensors", SAMPLE)
    return (place / "whole.safetensors").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused(place, whole, data):
    path = place / "cut.safetensors"
    n = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:n])
    assert "cut short" in refused(path) or "not a safetensors file" in refused(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_file_with_a_bent_head_is_refused_or_read_as_the_package_reads_it(place, whole, data):
    path = place / "bent.safetensors"
    n_head = 8 + struct.unpack("<Q", whole[:8])[0]
    bent, telling = bytearray(whole), list(b'0123456789-.,:{}[]"\\eE\nnfut \xff\x00')
    for _ in range(data.draw(st.integers(1, 2))):
        bent[data.draw(st.integers(0, n_head - 1))] = data.draw(st.sampled_from(telling) | st.integers(0, 255))
    path.write_bytes(bent)
    try:
        theirs = safetensors.torch.load(bytes(bent))
    except safetensors.SafetensorError:
        refused(path)
        return
    assert same(read_safetensors(path), theirs)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
SECOND = {"dtype": "F32", "shape": [6], "data_offsets": [24, 48]}


@pytest.mark.parametrize(("change", "told"), [
    ({"data_offsets": [24, 0]}, "claims shape (2, 3) in -24 bytes"), ({"data_offsets": [-24, 0]}, "no type, shape and place"),
    ({"data_offsets": [0.0, 24.0]}, "no type, shape and place"), ({"data_offsets": [0, "24"]}, "no type, shape and place"),
    ({"data_offsets": [0, True]}, "no type, shape and place"), ({"data_offsets": [0]}, "no type, shape and place"),
    ({"data_offsets": [0, 24, 48]}, "no type, shape and place"), ({"data_offsets": None}, "no type, shape and place"),
    ({"data_offsets": {"0": 0, "24": 24}}, "no type, shape and place"), ({"data_offsets": [0, 24 + 2 ** 64]}, "claims shape"),
    ({"shape": [2, 4]}, "claims shape (2, 4) in 24 bytes"), ({"shape": [-2, -3]}, "no type, shape and place"), ({"shape": None}, "no type"),
    ({"shape": 6}, "no type, shape and place"), ({"shape": [2.0, 3]}, "no type, shape and place"), ({"shape": "23"}, "no type, shape and place"),
    ({"shape": [True, 6]}, "no type, shape and place"), ({"shape": [2, 3, 10 ** 30]}, "claims shape"),
    ({"dtype": "F8_E4M3"}, "has type 'F8_E4M3', which is not read here; known are F64, F32"), ({"dtype": "f32"}, "'f32'"),
    ({"dtype": ["F32"]}, "no type, shape and place"), ({"dtype": None}, "no type, shape and place"), ({"dtype": "BF16"}, "claims shape"),
    ({"shape": [3, 3], "data_offsets": [0, 36]}, "'b' begins at byte {24}, expected {36}, right behind 'a'"),
    ({"shape": [1, 3], "data_offsets": [0, 12]}, "'b' begins at byte {24}, expected {12}, right behind 'a'"),
    ({"data_offsets": [24, 48]}, "begins at byte {24}, expected {0}"), ({"data_offsets": [1000, 1024]}, "begins at byte {24}, expected {0}"),
])
def test_a_forged_entry_is_refused(tmp_path, change, told):
    header = {"a": {**ENTRY, **change}, "b": SECOND}
    path = forge(tmp_path / "x.safetensors", header)
    start = 8 + len(json.dumps(header))
    for n in (0, 12, 24, 36):
        told = told.replace(f"{{{n}}}", str(start + n))
    assert told in refused(path)


@pytest.mark.parametrize("entry", [None, 5, [], "F32", {}, {"dtype": "F32"}, {"shape": [1]}, [ENTRY]])
def test_an_entry_that_is_none_is_refused(tmp_path, entry):
    assert "the header's entry for 'a' is no type, shape and place" in refused(forge(tmp_path / "x.safetensors", {"a": entry}))


def test_the_file_ends_where_its_tensors_do(tmp_path):
    path = tmp_path / "x.safetensors"
    good = {"b": SECOND, "a": ENTRY}                                                  # the order of the header is free
    assert list(read_safetensors(forge(path, good))) == ["b", "a"]
    assert "has 1 bytes behind its last tensor 'b', expected none" in refused(forge(path, good, b"\0" * 49))
    assert f"'b' ends at byte {8 + len(json.dumps(good)) + 48}, the file at" in refused(forge(path, good, b"\0" * 47))
    assert "has 48 bytes behind" in refused(forge(path, {"__metadata__": {"format": "pt"}}))
    assert read_safetensors(forge(path, {}, b"")) == {}


@pytest.mark.parametrize("header", [b"[]", b"5", b"null", b"{", b'{"a":', b"\xff\xfe", b"[" * 50_000, b'{"a":' * 50_000, b"9" * 5000, b" "])
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    assert "is not a safetensors file, or is cut short" in refused(forge(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("length", [0, 49, 2 ** 31, 2 ** 63, 2 ** 64 - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path, length):
    assert "is not a safetensors file, or is cut short" in refused(forge(tmp_path / "x.safetensors", b"{}", b"", length))


def test_a_name_cannot_break_the_line(tmp_path):
    assert r"'a\nb'" in refused(forge(tmp_path / "x.safetensors", {"a\nb": {**ENTRY, "shape": [1]}}))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".BIN"])
def test_pickles_are_refused_saying_why(tmp_path, suffix):
    path = tmp_path / f"pytorch_model{suffix}"
    torch.save({"a": torch.ones(1)}, path)
    assert "is a pickle, which can run code when it is read; convert it to safetensors" in refused(path)
    with pytest.raises(WeightsError, match="is a pickle, which can run code"):
        read_folder(tmp_path)


def test_a_file_that_is_not_there_or_a_folder_is_told(tmp_path):
    assert refused(tmp_path / "none.safetensors").endswith("there is no such file or folder; check the path")
    assert refused(tmp_path).endswith("this is a folder; a file was expected")


# ---- folders

@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\xff", '{"weight_map": {"a": {}}}', "[" * 50_000])
def test_an_index_that_is_none_is_told(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(WeightsError, match="is not a safetensors index|is missing") as error:
        read_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_an_index_reads_nothing_outside_its_folder(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_safetensors(tmp_path / "secret.safetensors", SAMPLE)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(WeightsError, match="secret.safetensors is missing"):
        read_folder(folder)


def test_a_folder_without_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="holds no model.safetensors; it should be a bundle or a Hugging Face folder"):
        read_folder(tmp_path)


# ---- into a model

class Tied(nn.Module):
    """A tied matrix, a buffer, a frozen parameter, and one that is switched off."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.bias = None
        self.register_parameter("off", None)


def test_a_tied_tensor_stands_once_and_stays_tied(tmp_path):
    source, target = Tied(), Tied()
    source.norm.running_mean.add_(3)
    write_safetensors(tmp_path / "x.safetensors", parameters(source))
    assert "head.weight" not in header_of(tmp_path / "x.safetensors")[0]
    assign(target, read_safetensors(tmp_path / "x.safetensors"), "x")
    assert target.head.weight is target.embed.weight and same(parameters(source), parameters(target))
    assert target.embed.weight.requires_grad and not target.frozen.requires_grad and target.norm.num_batches_tracked.dtype == torch.int64
    assert torch.equal(target.norm.running_mean, torch.full((3,), 3.0))


@pytest.mark.parametrize(("change", "told"), [
    ({"frozen": None}, r"here: tensor 'frozen' \(2,\) is missing"),
    ({"frozen": torch.ones(3)}, r"'frozen' has shape \(3,\), the config wants \(2,\)"),
    ({"head.weight": torch.ones(5, 3)}, r"tensor 'head.weight' \(5, 3\) has no place"), ({"\n": torch.ones(1)}, r"'\\n' \(1,\) has no place"),
    ({"frozen": torch.ones(2, dtype=torch.int32)}, "'frozen' has type torch.int32, the model wants torch.float32"),
    ({"norm.num_batches_tracked": torch.tensor(1.5)}, "has type torch.float32, the model wants torch.int64"),
])
def test_what_does_not_fit_a_model_is_named_and_changes_nothing(change, told):
    model = Tied()
    before = {name: tensor.clone() for name, tensor in parameters(model).items()}
    tensors = {name: tensor for name, tensor in {**{k: torch.zeros_like(v) for k, v in before.items()}, **change}.items() if tensor is not None}
    with pytest.raises(HanokError, match=told) as error:
        assign(model, tensors, "here")
    assert "\n" not in str(error.value) and same(parameters(model), before)


def test_names_are_taken_in_any_order():
    model, names = Tied(), list(parameters(Tied()))
    random.Random(0).shuffle(names)
    wanted = parameters(Tied())
    assign(model, {name: wanted[name] for name in names}, "x")
    assert same(parameters(model), wanted)
