"""Two ranks train what one trains: the same losses, checkpoints that any number of ranks reads, decisions made together, and an end for all."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanok.bundle.weights import read_safetensors
from hanok.cli.launch import as_typed, launch
from hanok.contracts import IGNORE_INDEX, Batch
from hanok.errors import ConfigError
from hanok.train.checkpoint import Run
from hanok.train.compiled import Compiled
from hanok.train.distributed import ALONE, RankError, Ranks, buckets, for_all, for_one, join
from hanok.train.optim import optimizers
from hanok.train.pretrain import Pretraining
from hanok.train.recipe import TrainRecipe
from hanok.train.runs import Signals, Terminated
from hanok.train.trainer import Trainer
from ranks import do, write_text
from tiny import CONFIG, model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")         # of torch.distributed
RANKS = str(Path(__file__).parents[1] / "ranks.py")
MUON = ["train.optimizer=muon", "train.clip=0.5", "train.ema_decay=0.9"]
HALVES = ["train.micro_batch_size=4", "train.grad_accum_steps=2"]
DROPOUT = ["model.sizes.dropout=0.1", *MUON]
FSDP = ["train.parallel=fsdp"]
RARELY = "train.checkpoint_every=15"
SAME = {                                                 # (kind, settings), and how two ranks split an update's 8 rows
    "qwen3 muon": ("qwen3", MUON, [4, 1]), "qwen3 adamw halves": ("qwen3", HALVES, [4, 1]), "gpt2 adamw thirds": (
        "gpt2", ["train.micro_batch_size=2", "train.grad_accum_steps=3"], [1, 3]), "bert muon": ("bert", MUON, [4, 1]),
    "t5 muon halves": ("t5", [*MUON, *HALVES], [4, 1]), "bahdanau adamw": ("bahdanau", [], [4, 1]),
    "bahdanau by tokens": ("bahdanau", [*HALVES, "data.batch_tokens=60"], [4, 1]), "lstm halves": ("lstm", HALVES, [4, 1]),
    "lstm eighths": ("lstm", ["train.micro_batch_size=2", "train.grad_accum_steps=4"], [2, 2])}
BOTH = ("qwen3 muon", "qwen3 adamw halves", "bert muon", "t5 muon halves", "bahdanau adamw")    # by ddp and by fsdp


def two(jobs: list[dict], text: Path, path: Path) -> dict:
    """The jobs, done by two ranks one after the other."""
    path.write_text(json.dumps({"jobs": jobs, "text": str(text)}))
    launch(2, [str(path)], [RANKS])
    return json.loads(path.with_suffix(".results").read_text())


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def cut(runs, text) -> Path:
    """A run of one process that stopped behind update 7, twice."""
    for name in ("one to ddp", "one to fsdp", "one to one"):
        do({"kind": "qwen3", "out": str(runs / name), "settings": MUON, "stop": 7}, text, ALONE)
    for name in ("lstm to ddp", "lstm to one"):
        do({"kind": "lstm", "out": str(runs / name), "settings": HALVES, "stop": 7}, text, ALONE)
    return runs


@pytest.fixture(scope="module")
def done(cut, text) -> dict:
    """All that two ranks do in this file, but for dying."""
    def job(name: str, kind: str, settings: list[str], **more) -> dict:
        return {"name": name, "kind": kind, "out": str(cut / more.pop("out", name)), "settings": settings, **more}

    jobs = [job(name, kind, [*settings, RARELY]) for name, (kind, settings, _) in SAME.items()]
    jobs += [job(f"{name} fsdp", SAME[name][0], [*SAME[name][1], *FSDP, RARELY]) for name in BOTH]
    for parallel in ("ddp", "fsdp"):
        told = [*DROPOUT, f"train.parallel={parallel}"]
        jobs += [job(f"{parallel} whole", "qwen3", told), job(f"{parallel} stopped", "qwen3", told, out=f"{parallel} cut", stop=7),
                 job(f"{parallel} went on", "qwen3", [], out=f"{parallel} cut", resume=True),
                 job(f"{parallel} first", "qwen3", [*MUON, f"train.parallel={parallel}"], stop=7),
                 job(f"{parallel} to one", "qwen3", [*MUON, f"train.parallel={parallel}"], stop=7),
                 job(f"one to {parallel}", "qwen3", [f"train.parallel={parallel}"], resume=True)]
    jobs += [job("ddp to fsdp", "qwen3", FSDP, out="ddp first", resume=True),
             job("fsdp to ddp", "qwen3", ["train.parallel=ddp"], out="fsdp first", resume=True),
             job("lstm stopped", "lstm", HALVES, out="lstm 2 to one", stop=7), job("lstm to ddp", "lstm", [], resume=True),
             job("rollback", "gpt2", ["train.on_spike=rollback"], poison=[1, 7]), job("stop", "gpt2", [], poison=[1, 7]),
             job("odd", "gpt2", ["train.micro_batch_size=3"]), job("by tokens", "bahdanau", ["data.batch_tokens=60"]),
             job("lstm fsdp", "lstm", FSDP), job("other", "gpt2", [], out="odd")]
    return two(jobs, text, cut / "jobs.json")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(folder / "model.safetensors")


def close(some: list[float], others: list[float]) -> bool:
    return len(some) == len(others) and some == pytest.approx(others, rel=1e-5)


# ---- the same losses
@pytest.mark.parametrize("name", SAME)
def test_two_ranks_lose_what_one_loses(name, done, runs, text):
    kind, settings, split = SAME[name]
    one = do({"kind": kind, "out": str(runs / f"{name} alone"), "settings": settings}, text, ALONE)
    assert one["losses"][-1] < one["losses"][0] - 0.1 and len(one["losses"]) == 20
    for many in [name, f"{name} fsdp"] if name in BOTH else [name]:
        assert close(done[many]["losses"], one["losses"]), many
        assert done[many]["validation"] == pytest.approx(one["validation"], rel=1e-5) and done[many]["parts"] == [split, split]
        ours, theirs = weights(runs / many), weights(runs / f"{name} alone")
        assert list(ours) == list(theirs) and all((ours[key] - theirs[key]).abs().max() < 2e-2 for key in ours)
        rows = (runs / many / "metrics.csv").read_text().splitlines()
        assert len(rows) == len((runs / f"{name} alone" / "metrics.csv").read_text().splitlines()), "one rank writes"


# ---- checkpoints
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_go_on_to_the_bit(parallel, done, runs):
    """With dropout, of which each rank has its own."""
    assert done[f"{parallel} stopped"]["losses"] + done[f"{parallel} went on"]["losses"] == done[f"{parallel} whole"]["losses"]
    assert (runs / f"{parallel} cut" / "model.safetensors").read_bytes() == (runs / f"{parallel} whole" / "model.safetensors").read_bytes()
    ranks = Run(runs / f"{parallel} cut").state(runs / f"{parallel} cut" / "checkpoints" / "step-00000020")["ranks"]
    assert len(ranks) == 2 and ranks[0] != ranks[1]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_sharded_checkpoint_is_safetensors_and_json(parallel, done, runs):
    folder = runs / f"{parallel} whole" / "checkpoints" / "step-00000020"
    files = [f"shard-0000{n}-model-00001-of-00001.safetensors" for n in (1, 2)]
    assert sorted(path.name for path in folder.iterdir()) == [*files, "state.json"]
    parts = [read_safetensors(folder / name) for name in files]
    names = {name for part in parts for name in part}
    assert {"random/0/torch", "random/1/torch", "ema/embed.token.weight", "optimizer/0/stack.blocks.0.ffn.up.weight/momentum",
            "optimizer/1/embed.token.weight/exp_avg_sq", "model/embed.token.weight"} <= names
    shape = (150, 32) if parallel == "fsdp" else (300, 32)
    assert all(tuple(part["model/embed.token.weight"].shape) == shape for part in parts if "model/embed.token.weight" in part)
    assert not list((runs / f"{parallel} whole").rglob(".*")), "nothing half-written is left"


def test_any_number_of_ranks_goes_on_with_any_checkpoint(done, runs, text):
    whole = do({"kind": "qwen3", "out": str(runs / "whole"), "settings": MUON}, text, ALONE)["losses"]
    for name in ("one to ddp", "one to fsdp", "ddp to fsdp", "fsdp to ddp"):
        assert close(done[name]["losses"], whole[7:]), name
    for parallel in ("ddp", "fsdp"):
        assert close(do({"out": str(runs / f"{parallel} to one"), "resume": True}, text, ALONE)["losses"], whole[7:])
    assert do({"out": str(runs / "one to one"), "resume": True}, text, ALONE)["losses"] == whole[7:]


def test_streams_and_what_is_carried_are_dealt_anew(done, runs, text):
    whole = do({"out": str(runs / "lstm to one"), "resume": True}, text, ALONE)["losses"]
    assert close(done["lstm to ddp"]["losses"], whole) and len(whole) == 13
    assert close(do({"out": str(runs / "lstm 2 to one"), "resume": True}, text, ALONE)["losses"], whole)


def test_a_shard_that_is_gone_or_cut_short_is_told(done, runs, tmp_path):
    folder = runs / "gpt2 adamw thirds" / "checkpoints" / "step-00000020"
    shard = folder / "shard-00002-model-00001-of-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    path, told = Run(runs / "gpt2 adamw thirds").newest_whole()
    assert path is not None and path.name == "step-00000015" and str(shard) in told
    shard.unlink()
    path, told = Run(runs / "gpt2 adamw thirds").newest_whole()
    assert path is not None and path.name == "step-00000015" and "step-00000020 has 1 shards of 2" in told
    shard.write_bytes(whole)


# ---- decided together
def test_a_loss_that_is_no_number_on_one_rank_is_none_on_all(done):
    assert done["rollback"]["rollbacks"] == [1, 1] and len(done["rollback"]["losses"]) == 22 and done["rollback"]["step"] == 20
    assert done["stop"]["error"].startswith("the loss of step 8 is nan; ") and "step-00000007" in done["stop"]["error"]


def test_what_two_ranks_cannot_share_is_refused_in_a_line(done, runs):
    told = {name: done[name]["error"] for name in ("odd", "by tokens", "lstm fsdp")}
    assert told["odd"].startswith("an update has 3 x 1 = 3 rows") and "2 ranks cannot share evenly; make it a multiple of 2" in told["odd"]
    assert told["by tokens"].startswith("train.grad_accum_steps is 1, which 2 ranks cannot share evenly")
    assert told["lstm fsdp"] == "lstm carries a state from batch to batch, which train.parallel=fsdp does not cut up; take ddp"
    assert not any("\n" in line for line in told.values())
    assert not (runs / "by tokens").exists() and len(done["other"]["losses"]) == 20


# ---- an end for all
def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on_to_the_bit(done, runs, text, tmp_path, capfd):
    job = {"name": "cut", "kind": "qwen3", "out": str(tmp_path / "run"), "settings": [*DROPOUT, "train.parallel=ddp"]}
    with pytest.raises(SystemExit) as left:
        two([{**job, "die": [1, 8]}], text, tmp_path / "die.json")
    assert left.value.code == 2
    assert capfd.readouterr().err == ("hanok: rank 1 was killed (SIGKILL), and all ranks were ended; hanok pretrain --resume RUN goes on from the "
                                      "newest checkpoint\n")
    Run(tmp_path / "run").lock()                                                      # nobody trains there any more
    went_on = two([{**job, "resume": True, "settings": []}], text, tmp_path / "on.json")["cut"]
    assert went_on["losses"] == done["ddp whole"]["losses"][5:]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (runs / "ddp whole" / "model.safetensors").read_bytes()


CHILD = "import os, sys, time\nrank = int(os.environ['RANK'])\n"
ENDS = {
    "a mistake of one": ("if rank: sys.exit(print('hanok: no such thing', file=sys.stderr) or 2)\ntime.sleep(99)", 2,
                         ["hanok: rank 1: no such thing"]),
    "a mistake of all": ("sys.exit(print('hanok: no such thing', file=sys.stderr) or 2)", 2, ["hanok: no such thing"]),
    "a fault": ("if rank: print('A note', file=sys.stderr); 1 / 0\ntime.sleep(99)", 1,
                ["hanok: rank 1: ZeroDivisionError: division by zero", "A note", "Traceback (most recent call last):"]),
    "nothing said": ("if rank: sys.exit(7)\ntime.sleep(99)", 7, ["hanok: rank 1: it ended with status 7 and no word"]),
    "asked before it knew how": ("if not rank: os.kill(os.getppid(), 15)\ntime.sleep(99)", 143, ["hanok: it was asked to leave, and there was nothing"
                                                                                                  " new to keep"]),
    "the first rank": ("if not rank: sys.exit(print('hanok: first', file=sys.stderr) or 2)\ntime.sleep(99)", 2, ["hanok: first"]),
}


@pytest.mark.parametrize("what", ENDS)
def test_the_error_of_the_rank_that_failed_comes_first(what, tmp_path, capfd):
    program, status, lines = ENDS[what]
    (tmp_path / "child.py").write_text(CHILD + program)
    with pytest.raises(SystemExit) as left:
        launch(2, [], [str(tmp_path / "child.py")])
    assert left.value.code == status and capfd.readouterr().err.splitlines()[:len(lines)] == lines


def test_a_signal_that_comes_while_ranks_are_started_reaches_them_all(tmp_path, monkeypatch):
    """The first one asks before the second is there."""
    (tmp_path / "child.py").write_text(CHILD + "time.sleep(99)")
    start, n_started = subprocess.Popen, []

    def slowly(*arguments, **more):
        process = start(*arguments, **more)
        n_started.append(process)
        if len(n_started) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", slowly)
    with pytest.raises(SystemExit) as left:
        launch(2, [], [str(tmp_path / "child.py")])
    assert left.value.code == 143 and [process.returncode for process in n_started] == [-15, -15]


def test_a_command_ends_by_a_signal_and_not_behind_its_parent(text, tmp_path):
    """SIGTERM: a checkpoint of all ranks. A parent that is killed: its ranks end, so that the run can go on at once."""
    told = ["--family=gpt2", *(f"--set={name}" for name in (
        "model.sizes.d_model=32", "model.sizes.n_layers=1", "model.sizes.n_heads=2", "model.sizes.d_ff=64", "tokenizer.vocab_size=300",
        "data.seq_len=24", "data.validation=0.2", "train.steps=1000000", "train.sample_every=3", "train.sample_prompt=the house",
        "train.sample_tokens=2", "train.eval_every=1000000", "train.checkpoint_every=6"))]

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "hanok.cli.main", "pretrain", *arguments, "--nproc=2"], stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    def until(child: subprocess.Popen[str], begin: str) -> None:
        assert child.stderr is not None
        assert any(line.startswith(begin) for line in child.stderr), "it ended before"

    child = start(str(text), f"--out={tmp_path / 'run'}", *told)
    until(child, "step 6: ")
    child.send_signal(signal.SIGTERM)
    last = child.stderr.read().splitlines()[-1]
    assert child.wait() == 143 and last.startswith("hanok: terminated; what was learned so far is in ") and "step-" in last
    child = start(f"--resume={tmp_path / 'run'}")
    until(child, "step ")
    child.kill()
    child.stderr.read()                                                               # its end is that of the last rank
    child.wait()
    run = Run(tmp_path / "run")
    run.lock()
    assert run.newest_whole()[0] is not None and run.newest_whole()[1] == ""
    run.unlock()


# ---- who is there
NOT_THERE = {
    "no rank": ({"RANK": ""}, ConfigError, "RANK is missing; a whole number was expected"),
    "no word": ({"RANK": "one"}, ConfigError, "RANK is one; a whole number"),
    "no port": ({"RANK": "0", "MASTER_PORT": "99999"}, ConfigError, "MASTER_PORT is 99999; expected 1 to 65535"),
    "too many": ({"RANK": "2"}, ConfigError, "RANK is 2, WORLD_SIZE 2, MASTER_ADDR 127.0.0.1; torchrun sets them"),
    "nobody listens": ({"RANK": "1"}, RankError, r"rank 1 of 2 cannot reach rank 0 at 127.0.0.1:\d+ for 1 s, in vain; start all"),
    "nobody comes": ({"RANK": "0"}, RankError, r"rank 0 of 2 waited for the others at 127.0.0.1:\d+ for 1 s, in vain; start all"),
}


@pytest.mark.parametrize("what", NOT_THERE)
def test_a_rank_that_cannot_reach_the_others_says_so(what, monkeypatch, capfd):
    changes, kind, told = NOT_THERE[what]
    port = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port        # and is closed at once
    around = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HANOK_RENDEZVOUS_SECONDS": "1"}
    for name, value in {**around, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=told) as error:
        join()
    assert "\n" not in str(error.value) and (what == "nobody comes" or capfd.readouterr().err == "")      # torch's store has pages to say


def test_a_port_that_is_taken_is_told_at_once(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RankError, match=r"^rank 0 of 2 cannot listen at 127.0.0.1:\d+: another process does"):
            join()


def test_ranks_that_met_and_cannot_talk_say_so(monkeypatch):
    master = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    master.set("hanok/here/1", "here")
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(master.port), "GLOO_SOCKET_IFNAME": "none0",
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match="^rank 0 of 2 cannot talk with the others .*none0.*; check the firewall"):
        join()


def test_a_fault_in_the_first_ranks_turn_is_not_followed_by_the_others(monkeypatch):
    """They would stumble over what it left, and hide it."""
    monkeypatch.setattr("hanok.train.distributed.PATIENCE", 0)
    store = torch.distributed.HashStore()
    first, second = (Ranks(rank, 2, store=store, turns=count()) for rank in range(2))
    with pytest.raises(ZeroDivisionError), first.in_turn():
        1 / 0  # noqa: B018
    with pytest.raises(RankError, match="rank 1 of 2 waited for rank 0, which ended"), second.in_turn():
        raise AssertionError("it went on")


class Deaf(Ranks):
    """A rank that hears a signal while it waits for the others."""

    def sums(self, *numbers: float) -> list[float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return list(numbers)


def test_a_signal_that_comes_while_ranks_agree_is_heard_behind_the_next_update():
    with Signals() as signals:
        Pretraining.leave_if_asked(SimpleNamespace(ranks=Deaf(0, 2)), signals, None)
        with pytest.raises(Terminated):
            Pretraining.leave_if_asked(SimpleNamespace(ranks=Deaf(0, 2)), signals, None)


class Lost(Ranks):
    def add_up(self, parameters):
        raise RuntimeError("gloo: Connection closed by peer")


def test_a_lost_rank_is_no_fault_of_the_compilers(caplog):
    net, ids = model(CONFIG), torch.arange(12)[None]
    recipe = TrainRecipe(compile="off")
    hidden = Compiled(net.hidden)
    hidden.fast = lambda batch: net.hidden(batch)
    trainer = Trainer(net, optimizers(net, recipe), iter([Batch(ids, targets=ids)]), recipe, vocab_size=300, hidden=hidden, ranks=Lost())
    with pytest.raises(RuntimeError, match="Connection closed"):
        trainer.step()
    assert not caplog.records


def test_alone_there_is_nobody_to_ask(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = join()
    assert ranks.n == 1 and ranks.first and ranks.sums(1, 2.5) == [1, 2.5] and ranks.share("x") == "x" and ranks.gather(3) == [3]
    with ranks.in_turn(), pytest.raises(RuntimeError, match="connection"), ranks.together():
        raise RuntimeError("connection")                                              # a fault of ours stays one


# ---- rows, places, arguments
@given(st.integers(1, 24), st.integers(1, 12), st.integers(1, 8))
def test_an_updates_rows_are_dealt_evenly_and_no_forward_grows(rows, steps, n):
    recipe = TrainRecipe(micro_batch_size=rows, grad_accum_steps=steps)
    if rows * steps % n:
        with pytest.raises(ConfigError, match="cannot share evenly"):
            Ranks(0, n).part_of(recipe)
        return
    part = Ranks(0, n).part_of(recipe)
    assert part.micro_batch_size * part.grad_accum_steps * n == rows * steps and part.micro_batch_size <= rows
    saved = {"number": 5 * part.grad_accum_steps, "skipped": list(range(2 * part.grad_accum_steps, 3 * part.grad_accum_steps)),
             "loader": {"window": 7, "global_batch_size": part.micro_batch_size * n}}
    whole = for_all(saved, part, recipe)
    assert whole == {"number": 5 * steps, "skipped": list(range(2 * steps, 3 * steps)), "loader": {"window": 7, "global_batch_size": rows}}
    assert for_one(whole, part, recipe, saved["loader"]) == saved


@given(st.integers(0, 9), st.integers(1, 4))
def test_every_batch_is_dealt_once_and_all_ranks_get_as_many(n_batches, n):
    batches = [Batch(torch.tensor([[i]]), targets=torch.tensor([[i]])) for i in range(n_batches)]
    dealt = [list(Ranks(rank, n).deal(batches)) for rank in range(n)]
    assert len({len(some) for some in dealt}) == 1
    asked = [batch.targets.item() for some in dealt for batch in some if batch.targets.item() != IGNORE_INDEX]
    assert sorted(asked) == list(range(n_batches))


def test_gradients_are_added_up_in_buckets_of_one_type(monkeypatch):
    monkeypatch.setattr("hanok.train.distributed.BUCKET", 10)
    grads = [torch.zeros(n, dtype=dtype) for n, dtype in ((4, torch.float32), (6, torch.float32), (1, torch.float32), (2, torch.bfloat16),
                                                          (30, torch.bfloat16))]
    assert [[grad.numel() for grad in bucket] for bucket in buckets(grads)] == [[4, 6], [1], [2], [30]]


def test_ranks_get_the_command_as_it_was_typed():
    told = {"text": [Path("a b"), Path("c"), Path("./-d")], "out": Path("run"), "recipe": None, "steps": 3, "set": ["train.clip=1", "data.rate=0.2"],
            "force": True, "quiet": False}
    assert as_typed(told) == ["a b", "c", "./-d", "--out=run", "--steps=3", "--set=train.clip=1", "--set=data.rate=0.2", "--force"]
    with pytest.raises(ConfigError, match="TEXT is - "):
        as_typed({"text": ["-"]})


@pytest.mark.parametrize(("n", "around", "told"), [(0, "", "--nproc is 0; expected 1 or more"), (2, "2", "--nproc was given to one of several")])
def test_what_cannot_be_launched_is_refused(n, around, told, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", around)
    with pytest.raises(ConfigError, match=told):
        launch(n, [])


# ---- precision
def test_in_bf16_it_learns_nearly_the_same(tmp_path, text):
    wide, narrow = (do({"kind": "qwen3", "out": str(tmp_path / name), "settings": [f"train.precision={name}"]}, text, ALONE)["losses"]
                    for name in ("fp32", "bf16"))
    assert narrow != wide and narrow == pytest.approx(wide, rel=0.02)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "bf16").values())
    assert replace(TrainRecipe(), precision="bf16").precision == "bf16"
