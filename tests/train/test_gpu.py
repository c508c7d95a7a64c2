"""On a CUDA device: bf16 and compiled, it learns what the CPU learns in fp32; a run goes on to the bit; NCCL's ranks are one run."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hanok.cli.launch import launch
from hanok.contracts import Batch
from hanok.train.distributed import Ranks
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer, precision
from ranks import do, write_text
from tiny import CONFIG, model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")]     # of torch's compiler
RECIPE = TrainRecipe(steps=12, optimizer="adamw", learning_rate=1e-2, warmup_steps=4, compile="off", precision="fp32")
FIXED = ["model.sizes.dropout=0.1", "train.optimizer=muon", "train.compile=off"]


def losses(recipe: TrainRecipe, device: str, documents: bool = False) -> list[float]:
    """Of the same rows again and again; in two documents, if asked."""
    ids = torch.randint(300, (8, 33), generator=torch.Generator().manual_seed(0))
    numbers = (torch.arange(32) // 16).expand(8, 32).contiguous() if documents else None
    batch = Batch(ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous(), document_ids=numbers)
    net = model(CONFIG).to(device)
    made = Trainer(net, optimizers(net, recipe), iter([batch] * recipe.steps), recipe, vocab_size=300, device=device)
    net.train()
    return [made.step().loss for _ in range(recipe.steps)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_auto_is_bf16_where_the_device_has_it_and_nothing_recurs():
    from hanok.models import catalog
    cuda, lstm = torch.device("cuda"), catalog.FAMILIES["lstm"]
    assert precision("auto", model(), cuda) == ("bf16" if torch.cuda.is_bf16_supported() else "fp32")
    assert precision("auto", lstm.build(lstm.presets["tiny"]), cuda) == "fp32" and precision("fp32", model(), cuda) == "fp32"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_in_fp32_it_loses_what_the_cpu_loses(optimizer):
    """Muon iterates in bf16 there, in fp32 on CPUs."""
    recipe = replace(RECIPE, optimizer=optimizer)
    assert losses(recipe, "cuda") == pytest.approx(losses(recipe, "cpu"), rel=1e-2 if optimizer == "adamw" else 0.1)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("compiled", ["off", "on"])
def test_in_bf16_it_learns_nearly_the_same(compiled, documents):
    wide, narrow = losses(RECIPE, "cpu", documents), losses(replace(RECIPE, precision="bf16", compile=compiled), "cuda", documents)
    assert narrow[0] == pytest.approx(wide[0], rel=0.02) and narrow[-1] < narrow[0] - 1 and narrow[-1] == pytest.approx(wide[-1], rel=0.15)


def test_the_causal_kernel_is_flash_attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from hanok.nn.attention import attend
    q, k, v = (torch.randn(2, heads, 64, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):                                     # and no other may answer
        assert attend(q, k, v, is_causal=True).shape == q.shape


def test_some_updates_and_the_rest_are_all_updates_to_the_bit(text, tmp_path):
    alone = Ranks(device=torch.device("cuda"))
    whole = do({"kind": "qwen3", "out": str(tmp_path / "whole"), "settings": FIXED}, text, alone)["losses"]
    first = do({"kind": "qwen3", "out": str(tmp_path / "cut"), "settings": FIXED, "stop": 7}, text, alone)["losses"]
    assert first + do({"out": str(tmp_path / "cut"), "resume": True}, text, alone)["losses"] == whole
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_devices_lose_what_one_loses(text, tmp_path):
    settings = ["train.precision=fp32", "train.compile=off"]
    jobs = [{"name": name, "kind": "gpt2", "out": str(tmp_path / name), "settings": [*settings, f"train.parallel={name}"]}
            for name in ("ddp", "fsdp")]
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps({"jobs": jobs, "text": str(text)}))
    launch(2, [str(path)], [str(Path(__file__).parents[1] / "ranks.py")])
    one = do({"kind": "gpt2", "out": str(tmp_path / "one"), "settings": settings}, text, Ranks(device=torch.device("cuda")))["losses"]
    for name, told in json.loads(path.with_suffix(".results").read_text()).items():
        assert told["losses"] == pytest.approx(one, rel=1e-4), name
