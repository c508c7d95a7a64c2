"""torch.compile: the same numbers where it works, the plain model and one line where it does not."""
from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hanok.contracts import Batch
from hanok.errors import RequestError
from hanok.nn.loss import for_compilers, loss_and_gradient
from hanok.train.compiled import Compiled, fix_sizes, gradient_of, hidden_of
from hanok.train.distributed import Ranks
from hanok.train.optim import optimizers
from hanok.train.pretrain import begin
from hanok.train.recipe import TrainRecipe
from hanok.train.trainer import Trainer
from ranks import do, recipe_of, write_text
from tiny import CONFIG, model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")      # of torch's compiler
RECIPE = TrainRecipe(steps=3, optimizer="adamw", learning_rate=1e-2, warmup_steps=0)


def losses(recipe: TrainRecipe) -> list[float]:
    ids = torch.randint(300, (4, 13), generator=torch.Generator().manual_seed(0))
    net = model(replace(CONFIG, n_layers=1))
    batch = Batch(ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())
    made = Trainer(net, optimizers(net, recipe), iter([batch] * 3), recipe, vocab_size=300)
    net.train()
    return [made.step().loss for _ in range(3)]


def test_auto_compiles_on_a_gpu_and_nowhere_else():
    net = model()
    assert hidden_of(net, "auto", torch.device("cpu")) == net.hidden == hidden_of(net, "off", torch.device("cuda"))
    for told in (("on", "cpu"), ("auto", "cuda")):
        assert isinstance(hidden_of(net, told[0], torch.device(told[1])), Compiled)


def test_the_losss_gradient_is_compiled_beside_a_model_on_a_gpu():
    net, cuda = model(), torch.device("cuda")
    assert gradient_of(net, "on", torch.device("cpu")) is gradient_of(net, "off", cuda) is loss_and_gradient
    made = gradient_of(net, "auto", cuda)
    assert isinstance(made, Compiled) and (made.told, made.plain) == (for_compilers, loss_and_gradient)


@pytest.mark.parametrize("packed", [True, False])
def test_packed_rows_are_compiled_for_their_own_length_whatever_came_before(packed):
    variable: list[bool] = []                            # for each time that it was compiled

    def backend(graph, inputs):
        variable.append(any(isinstance(part, torch.SymInt) for part in inputs))
        return graph.forward

    torch._dynamo.reset()
    fast = torch.compile(lambda batch: 2 * batch.token_ids + batch.document_ids.sum(), backend=backend)
    for n in (4, 8, 16, 8):
        ids = torch.arange(2 * n).view(2, n)
        batch = Batch(ids, document_ids=ids.clone())
        if packed:
            fix_sizes(batch)
        assert torch.equal(fast(batch), 2 * ids + ids.sum())
    assert variable == ([False] * 3 if packed else [False, True])


EMBEDDING = """
import torch
from hanok.train.compiled import compiled
torch.set_num_threads(2)
table, ids, weights = torch.nn.Embedding(5, 64), torch.randint(5, (64, 512)), torch.randn(64, 512, 64)

def plain(ids):
    return (table(ids) * 2.0 * weights).sum()

def gradient(of):
    return torch.autograd.grad(of(ids), table.weight)[0]

fast = compiled(plain)
print(all(torch.equal(gradient(fast), gradient(plain)) for _ in range(20)))
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_embedding_learns_what_it_learns_uncompiled_to_the_bit_each_time(tmp_path):
    """Each of five rows is asked for some six thousand times, by two threads; the compiler's own kernel adds that up in any order."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}            # where no kernel lies from another day
    done = subprocess.run([sys.executable, "-c", EMBEDDING], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr[-2000:]


@pytest.mark.conformance                                                             # a minute
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_some_updates_and_the_rest_are_all_updates_to_the_bit(tmp_path):
    """Packed rows, on two threads."""
    text = write_text(tmp_path)
    told = {"kind": "qwen3", "settings": ["model.sizes.dropout=0.1", "train.compile=on", "data.seq_len=200"]}
    n_threads, alone = torch.get_num_threads(), Ranks(device=torch.device("cpu"))
    torch.set_num_threads(2)
    try:
        whole = do({**told, "out": str(tmp_path / "whole")}, text, alone)["losses"]
        first = do({**told, "out": str(tmp_path / "cut"), "stop": 7}, text, alone)["losses"]
        assert first + do({"out": str(tmp_path / "cut"), "resume": True}, text, alone)["losses"] == whole
    finally:
        torch.set_num_threads(n_threads)
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("kind", "mode", "plain"), [("t5", "auto", True), ("t5", "on", False), ("gpt2", "auto", False)])
def test_pairs_are_compiled_only_for_who_asks(kind, mode, plain, tmp_path):
    made = begin(recipe_of(kind, write_text(tmp_path), [f"train.compile={mode}"]), tmp_path / "run", ranks=Ranks(device=torch.device("cpu")))
    assert (made.prepared.hidden_of(made.model) == made.model.hidden) == plain


@pytest.mark.conformance                                                             # half a minute
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_is_plain(caplog):
    with caplog.at_level(logging.WARNING, "hanok"):
        assert losses(replace(RECIPE, compile="on")) == pytest.approx(losses(RECIPE), rel=1e-4)
    assert not [record for record in caplog.records if record.name == "hanok"]


def test_a_failure_falls_back_and_says_so_once(caplog, monkeypatch, tmp_path):
    """A machine without a C++ compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    import torch._inductor.config as inductor
    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nowhere/g++",))
    with caplog.at_level(logging.WARNING, "hanok"):
        assert losses(replace(RECIPE, compile="on")) == losses(RECIPE)
    line, = [record.getMessage() for record in caplog.records if record.name == "hanok"]
    assert line.startswith("torch.compile failed (") and line.endswith("; training goes on without it") and "\n" not in line


class Late(torch.autograd.Function):
    """What a compiler does that fails where the backward pass is asked for."""

    @staticmethod
    def forward(context, hidden):
        return hidden.clone()

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("no compiler\nno backward pass")


def test_a_backward_pass_that_fails_falls_back_too(caplog):
    """The update is made once more, with the random numbers that it had drawn."""
    told = replace(RECIPE, grad_accum_steps=2)

    def made(compiled: bool) -> Trainer:
        net = model(replace(CONFIG, n_layers=1, dropout=0.3))
        ids = torch.randint(300, (4, 13), generator=torch.Generator().manual_seed(0))
        hidden = Compiled(net.hidden) if compiled else net.hidden
        if compiled:
            hidden.fast = lambda batch: Late.apply(net.hidden(batch))
        net.train()
        torch.manual_seed(5)
        return Trainer(net, optimizers(net, told), iter([Batch(ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous())] * 6), told,
                       vocab_size=300, hidden=hidden)

    with caplog.at_level(logging.WARNING, "hanok"):
        numbers = [[(step := one.step()).loss, step.grad_norm] for one in (made(True),) for _ in range(3)]
    line, = [record.getMessage() for record in caplog.records if record.name == "hanok"]
    assert line == "torch.compile failed (no compiler); training goes on without it"
    plain = made(False)
    assert numbers == [[(step := plain.step()).loss, step.grad_norm] for _ in range(3)]


def test_what_stands_for_a_function_falls_back_to_it():
    def fails(x: int) -> int:
        raise RuntimeError("no compiler")

    made = Compiled(fails, abs)
    made.fast = fails
    assert (made(-3), made(-4), made.fast) == (3, 4, abs)


def test_a_mistake_of_the_models_own_comes_through():
    def refuses(batch: Batch) -> torch.Tensor:
        raise RequestError("17 tokens in a row")

    made = Compiled(refuses)
    made.fast = refuses
    with pytest.raises(RequestError):
        made(Batch(torch.zeros(1, 1, dtype=torch.long)))
    assert made.fast is refuses
