"""From the outer world to a bundle, and back: Hugging Face folders both ways; GGUF, nanoGPT's checkpoints and llama2.c's files in.

`load_any` takes whatever a path turns out to be, and `read_tokenizer` whatever holds a tokenizer.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from hanok.bundle import huggingface as hf
from hanok.bundle.bundle import Bundle, Generation, check_vocabulary, empty_model, is_bundle, load_bundle, read_bundle_config
from hanok.bundle.gguf import read_gguf
from hanok.bundle.llama2c import import_llama2c, tokenizer_from_llama2c
from hanok.bundle.nanogpt import SUFFIXES, import_nanogpt
from hanok.bundle.weights import assign, converted, read_folder, refuse_pickle, write_safetensors
from hanok.config import read_json, write_json
from hanok.disk import new_dir, read_bytes, read_text, sha256, write_text
from hanok.errors import ConfigError, DataError, TokenizerError
from hanok.text.tiktoken_ranks import is_rank_file, tokenizer_from_ranks
from hanok.text.tokenizer import Tokenizer

EXPECTED = "a bundle, a Hugging Face folder or a .gguf file was expected (nanoGPT's ckpt.pt and llama2.c's .bin are read too)"
ENDS = ("<|endoftext|>", "</s>")
"""Special tokens that end an answer where nothing else is told."""


def load_any(path: Path | str, tokenizer: Tokenizer | None = None) -> Bundle:
    """A bundle from a bundle, or in fp32 from a Hugging Face folder, a GGUF or llama2.c file or a nanoGPT checkpoint; `tokenizer` takes the place of
    its own. HanokError says what a path is when it is none of these."""
    bundle = _load(Path(path))
    return bundle if tokenizer is None else with_tokenizer(bundle, tokenizer, str(path))


def _load(path: Path) -> Bundle:
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder; {EXPECTED}")
    if path.is_dir():
        if is_bundle(path):
            return load_bundle(path)
        if hf.folder_of(path):
            return import_folder(path)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return import_gguf(ggufs[0])
        read_bundle_config(path)
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return import_nanogpt(path)
    if suffix == ".bin":
        return import_llama2c(path)
    refuse_pickle(path)
    if suffix == ".gguf":
        return import_gguf(path)
    raise DataError(f"{path} is not a model; {EXPECTED}")


def with_tokenizer(bundle: Bundle, tokenizer: Tokenizer, where: str) -> Bundle:
    """The bundle with this tokenizer, which names what ends an answer if the bundle does not. ConfigError if the model has too few rows for it."""
    check_vocabulary(bundle.config, tokenizer, where)
    ends = tuple(tokenizer.specials[name] for name in ENDS if name in tokenizer.specials)
    generation = replace(bundle.generation, stop_ids=bundle.generation.stop_ids or ends, add_special=_adds_special(tokenizer))
    return replace(bundle, tokenizer=tokenizer, generation=generation)


def read_tokenizer(path: Path, pre_tokenizer: str | None = None, specials: Mapping[str, int] | None = None) -> Tokenizer:
    """A tokenizer.json, a folder with one, a tiktoken rank file, or llama2.c's tokenizer.bin.

    How words are cut and special tokens (name -> id) can be told for a rank file alone. TokenizerError says what the file is instead.
    """
    if path.suffix.lower() == ".pkl":
        raise TokenizerError(f"{path} is a pickle, which can run code and is not opened, even if it is nanoGPT's meta.pkl of characters; "
                             "`hanok tokenizer train input.txt --kind characters --out NEW` makes a tokenizer of its text: give that")
    suffix, data = path.suffix.lower(), b"" if path.is_dir() else read_bytes(path)
    if suffix == ".tiktoken" or is_rank_file(data):
        return tokenizer_from_ranks(data, pre_tokenizer, specials, str(path))
    if pre_tokenizer is not None or specials:
        raise TokenizerError(f"{path} is no rank file of tiktoken's; only for one are --pre-tokenizer and --special told, others hold both")
    return tokenizer_from_llama2c(data, str(path)) if suffix == ".bin" else Tokenizer.load(path)


def import_folder(path: Path) -> Bundle:
    """A Hugging Face folder as a bundle, in fp32. ConfigError and WeightsError name whatever the family's table does not explain."""
    data = read_json(path / "config.json")
    family, table = hf.find_table(data, f"{path}/config.json")
    tensors = read_folder(path)
    config = hf.read_config(table, family, data, tensors, f"{path}/config.json")
    model = empty_model(family, config)
    ours = hf.read_weights(table, config, tensors, str(path))
    assign(model, dict(converted(ours.items(), torch.float32)), str(path))
    tokenizer, template = import_tokenizer(path)
    check_vocabulary(config, tokenizer, str(path))
    return Bundle(family, config, model.eval(), tokenizer, template, import_generation(path, data, tokenizer),
                  {"parent": {"format": "huggingface", "class": table.architecture, "weights_sha256": _hashes(path)}})


def import_tokenizer(path: Path) -> tuple[Tokenizer | None, str | None]:
    """The folder's tokenizer.json and chat template (its own file, or a string in tokenizer_config.json), where there are any."""
    tokenizer = Tokenizer.load(path / "tokenizer.json") if (path / "tokenizer.json").exists() else None
    if (path / "chat_template.jinja").exists():
        return tokenizer, read_text(path / "chat_template.jinja")
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):                                                    # several, by name
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return tokenizer, template


def import_generation(path: Path, data: Mapping[str, Any], tokenizer: Tokenizer | None) -> Generation:
    """How the model is asked, from generation_config.json, config.json and the tokenizer's end token."""
    told = {**data, **(read_json(path / "generation_config.json") if (path / "generation_config.json").exists() else {})}
    settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
    stops = told.get("eos_token_id")
    stop_ids = list(stops) if isinstance(stops, list) else [] if stops is None else [stops]
    eos = settings.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if tokenizer is not None and isinstance(eos, str) and tokenizer.id_of(eos) is not None and tokenizer.id_of(eos) not in stop_ids:
        stop_ids.append(tokenizer.id_of(eos))
    start = told.get("decoder_start_token_id")
    pooling = path / "1_Pooling" / "config.json"
    pooled = read_json(pooling) if pooling.exists() else {"pooling_mode_mean_tokens": True}
    sampled = told.get("do_sample", False)
    return Generation(
        stop_ids=tuple(stop_ids), start_ids=() if start is None else (start,), pad_id=max(0, told.get("pad_token_id") or 0),
        temperature=float(told.get("temperature") or 1.0) if sampled else 0.0, top_k=int(told.get("top_k") or 0) if sampled else 0,
        top_p=float(told.get("top_p") or 1.0) if sampled else 1.0, repetition_penalty=float(told.get("repetition_penalty") or 1.0),
        add_special=_adds_special(tokenizer),
        pooling=_pooling(pooled, str(pooling)))


POOLING: dict[str, Literal["mean", "first", "last"]] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first", "pooling_mode_lasttoken": "last"}


def _pooling(data: Mapping[str, Any], where: str) -> Literal["mean", "first", "last"]:
    """Sentence-transformers' pooling as ours. ConfigError for one that is not known, or for several at once."""
    chosen = [name for name, value in data.items() if name.startswith("pooling_mode") and value is True]
    if len(chosen) != 1 or chosen[0] not in POOLING:
        raise ConfigError(f"{where}: {' and '.join(chosen) or 'no pooling_mode'} is not supported; one of {', '.join(POOLING)} is")
    return POOLING[chosen[0]]


def _adds_special(tokenizer: Tokenizer | None) -> bool:
    """Whether the tokenizer frames a text with [CLS], </s> and the like, which models that read whole texts were trained with."""
    return tokenizer is not None and tokenizer.encode("a", add_special=True) != tokenizer.encode("a")


def import_gguf(path: Path) -> Bundle:
    """A GGUF file as a bundle, dequantised to fp32."""
    family, config, ours, tokenizer, metadata = read_gguf(path)
    model = empty_model(family, config)
    assign(model, ours, str(path))
    check_vocabulary(config, tokenizer, str(path))
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    also = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    stop_ids = tuple(dict.fromkeys(i for i in (eos, *also) if i is not None))
    return Bundle(family, config, model.eval(), tokenizer, metadata.get("tokenizer.chat_template"),
                  Generation(stop_ids=stop_ids, pad_id=metadata.get("tokenizer.ggml.padding_token_id", 0), add_special=_adds_special(tokenizer)),
                  {"parent": {"format": "gguf", "name": metadata.get("general.name", path.stem), "sha256": sha256(path)},
                   **({"licence": metadata["general.license"]} if "general.license" in metadata else {})})


def export_folder(bundle: Bundle, out: Path | str) -> Path:
    """Writes a Hugging Face folder that `transformers` opens. ConfigError where no class of theirs can express the model."""
    table = hf.writable(bundle.family, bundle.config)
    out = Path(out)
    with new_dir(out) as folder:
        write_safetensors(folder / "model.safetensors", hf.write_weights(table, bundle.config, bundle.model))
        config = hf.write_config(table, bundle.config)
        generation, special = bundle.generation, {}
        if generation.stop_ids:
            special["eos_token_id"] = generation.stop_ids[0] if len(generation.stop_ids) == 1 else list(generation.stop_ids)
        if generation.start_ids:
            special["decoder_start_token_id"] = generation.start_ids[0]
        special["pad_token_id"] = generation.pad_id
        weights = next(bundle.model.parameters()).dtype
        write_json(folder / "config.json", {**config, **special, "dtype": str(weights).removeprefix("torch.")})
        if bundle.family.kind != "encoder":
            sampled = generation.temperature > 0
            drawn = {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": generation.top_k} if sampled else {}
            write_json(folder / "generation_config.json",
                       {**special, "repetition_penalty": generation.repetition_penalty, "do_sample": sampled, **drawn})
        if bundle.tokenizer is not None:
            bundle.tokenizer.save(folder / "tokenizer.json")
            end = bundle.tokenizer.token(generation.stop_ids[0]) if generation.stop_ids else None
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": bundle.config.max_seq_len,
                        "clean_up_tokenization_spaces": False, **({"eos_token": end} if end else {})}
            write_json(folder / "tokenizer_config.json", settings)
        if bundle.family.kind == "encoder":
            write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": bundle.config.d_model, **{
                name: pooling == generation.pooling for name, pooling in POOLING.items()}})
        if bundle.chat_template is not None:
            write_text(folder / "chat_template.jinja", bundle.chat_template)
    return out


def _hashes(path: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(path.glob("*.safetensors"))}

