"""On a CUDA device: bf16 and compiled, it learns what the CPU learns in fp32; a run goes on to the bit; NCCL's ranks are one run.

    python -m pytest -m gpu [-n 4]
"""
from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hanok.cli.launch import launch
from hanok.contracts import IGNORE_INDEX, Batch
from hanok.nn.attention import attend
from hanok.nn.loss import token_cross_entropy
from hanok.nn.masks import Causal, Documents, Window, blocks, span_of
from hanok.train.compiled import forget, gradient_of
from hanok.train.distributed import Ranks, shard
from hanok.train.optim import optimizers
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer, precision
from ranks import KINDS, do, write_text
from tiny import CONFIG, model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
              pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")]     # of torch's compiler
CONFIG = replace(CONFIG, d_head=16)          # flex attention knows no smaller heads
RECIPE = TrainRecipe(steps=12, optimizer="adamw", learning_rate=1e-2, warmup_steps=4, compile="off", precision="fp32")
FIXED = ["model.sizes.dropout=0.1", "train.optimizer=muon"]


@pytest.fixture(autouse=True)
def nothing_fails_to_compile(caplog):
    forget()
    with caplog.at_level(logging.WARNING, "hanok"):
        yield
    assert not [record.getMessage() for record in caplog.get_records("call") if "torch.compile failed" in record.getMessage()]


def losses(recipe: TrainRecipe, device: str, documents: bool = False, cut: bool = False) -> list[float]:
    """Of the same rows again and again; in two documents, if asked; by a model that is cut up (into one part), if asked."""
    ids = torch.randint(300, (8, 33), generator=torch.Generator().manual_seed(0))
    numbers = (torch.arange(32) // 16).expand(8, 32).contiguous() if documents else None
    batch = Batch(ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous(), document_ids=numbers)
    net = model(CONFIG).to(device)
    if cut:
        shard(net, torch.device(device), 1)
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


@pytest.mark.parametrize("mode", ["off", "on"])
@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.2, 0.05)])
def test_the_loss_and_its_gradients_are_those_of_a_cpu(mode, smoothing, z):
    """An odd vocabulary, chunks of two sizes, and positions that are asked nothing."""
    torch.manual_seed(0)
    heads, hidden, targets = [nn.Linear(64, 301)], torch.randn(3, 50, 64), torch.randint(301, (3, 50))
    targets[0, :7] = IGNORE_INDEX
    heads.append(nn.Linear(64, 301).cuda())
    heads[1].load_state_dict(heads[0].state_dict())
    told = []
    for head, device in zip(heads, ("cpu", "cuda")):
        x = hidden.to(device).requires_grad_()
        total, _ = token_cross_entropy(x, targets.to(device), head, chunk_size=60, label_smoothing=smoothing, z_loss=z,
                                       gradient=gradient_of(head, mode, torch.device(device)))
        told.append([total, *torch.autograd.grad(total, [x, *head.parameters()])])
    for here, there in zip(*told):
        torch.testing.assert_close(there.cpu(), here, atol=1e-3, rtol=1e-3)


def test_the_causal_kernel_is_flash_attention():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    q, k, v = (torch.randn(2, heads, 64, 32, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):                                     # and no other may answer
        assert attend(q, k, v, is_causal=True).shape == q.shape


# ---- documents as blocks
def packed(n_rows: int, seq_len: int) -> torch.Tensor:
    """(B,T) documents of about 100 tokens."""
    return (torch.rand(n_rows, seq_len, generator=torch.Generator().manual_seed(1)) < 0.01).cumsum(1).cuda()


@pytest.mark.parametrize("seq_len", [33, 128, 129, 300])
@pytest.mark.parametrize("more", [(), (Window(50),)])
def test_blocks_answer_what_a_dense_mask_answers_and_so_do_their_gradients(more, seq_len):
    ids = packed(3, seq_len)
    made = blocks((Causal(), *more, Documents(ids)), span_of(Batch(ids)), 3)
    q, k, v = (torch.randn(3, heads, seq_len, 32, device="cuda", requires_grad=True) for heads in (4, 2, 2))
    told, fast = [], torch.compile(attend)
    for mask in (made, made.dense()):
        out = fast(q, k, v, mask)
        told.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for one, other in zip(*told):
        assert (one - other).abs().max() < 1e-3 * other.abs().max()


def test_under_the_compiler_documents_are_blocks_and_no_square_is_held():
    """Also where models of other lengths were compiled before; rows of one block are dense, for which flex attention has another kernel, and none for
    two queries a key and 96 places."""
    recipe, n_rows = replace(RECIPE, precision="bf16", compile="on", steps=2), 2
    for seq_len in (96, 256, 16384):
        net = model(replace(CONFIG, max_seq_len=seq_len)).cuda().train()
        ids = torch.randint(300, (n_rows, seq_len))
        batch = Batch(ids, targets=ids, document_ids=packed(n_rows, seq_len).cpu())
        made = Trainer(net, optimizers(net, recipe), iter([batch] * 2), recipe, vocab_size=300, device="cuda")
        made.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made.step()
    assert torch.cuda.max_memory_allocated() - before < n_rows * seq_len ** 2         # bytes: one for each place of the mask


def test_compiled_with_documents_it_loses_the_same_to_the_bit_each_time():
    recipe = replace(RECIPE, precision="bf16", compile="on")
    assert losses(recipe, "cuda", documents=True) == losses(recipe, "cuda", documents=True)


def test_an_update_is_deterministic_and_nothing_else_is():
    seen = []
    net = model(CONFIG).cuda().train()
    batch = Batch(torch.randint(300, (2, 8)), targets=torch.randint(300, (2, 8)))

    def hidden(batch: Batch) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return net.hidden(batch)

    Trainer(net, optimizers(net, RECIPE), iter([batch]), RECIPE, vocab_size=300, device="cuda", hidden=hidden).step()
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


# ---- runs
@pytest.mark.parametrize(("compiled", "seq_len"), [("off", 24), ("off", 300), ("on", 300)])
def test_some_updates_and_the_rest_are_all_updates_to_the_bit(compiled, seq_len, text, tmp_path):
    """In 300 tokens the gradients of attention's keys come from several blocks, and those of an embedding from many places."""
    alone, settings = Ranks(device=torch.device("cuda")), [*FIXED, f"train.compile={compiled}", f"data.seq_len={seq_len}"]
    whole = do({"kind": "qwen3", "out": str(tmp_path / "whole"), "settings": settings}, text, alone)["losses"]
    first = do({"kind": "qwen3", "out": str(tmp_path / "cut"), "settings": settings, "stop": 7}, text, alone)["losses"]
    assert first + do({"out": str(tmp_path / "cut"), "resume": True}, text, alone)["losses"] == whole
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


SAMPLED = ["train.sample_every=10", "train.steps=10", "train.compile=off"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loses_what_it_loses_on_a_cpu_and_speaks(kind, text, tmp_path):
    prompt = "the [MASK] stands" if kind == "bert" else "the house"
    settings = [*SAMPLED, "train.precision=fp32", f"train.sample_prompt={prompt}"]
    here, there = (do({"kind": kind, "out": str(tmp_path / name), "settings": settings}, text, Ranks(device=torch.device(name)))
                   for name in ("cpu", "cuda"))
    assert there["losses"] == pytest.approx(here["losses"], rel=2e-3) and there["validation"] == pytest.approx(here["validation"], rel=2e-3)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_compiled_and_in_bf16_other_families_learn_too(kind, text, tmp_path):
    settings = ["train.steps=10", "train.compile=on"]
    told = do({"kind": kind, "out": str(tmp_path / "run"), "settings": settings}, text, Ranks(device=torch.device("cuda")))["losses"]
    assert sum(told[-3:]) < sum(told[:3])


# ---- NCCL
@pytest.fixture
def nccl():
    import torch.distributed as dist
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_cut_up_by_fsdp_it_loses_what_it_loses_whole(optimizer, nccl):
    recipe = replace(RECIPE, optimizer=optimizer)
    assert losses(recipe, "cuda", cut=True) == pytest.approx(losses(recipe, "cuda"), rel=1e-3)


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
