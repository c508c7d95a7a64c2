"""The learning rate as a share of its peak: warm-up, and what comes behind it."""
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanok.errors import ConfigError
from hanok.train.recipe import TrainRecipe
from hanok.train.schedule import cosine, noam, share, wsd


@given(st.integers(0, 500), st.floats(0, 2), st.integers(0, 100), st.floats(0, 1))
def test_the_schedule_warms_up_and_falls_to_its_floor(step, progress, warmup, floor):
    share = cosine(step, progress, warmup_steps=warmup, floor=floor)
    assert 0 <= share <= 1
    if step > warmup:
        begin = min(1, progress) * warmup / step                                      # of the run, at the mean pace so far
        behind = (min(1, progress) - begin) / (1 - begin)
        assert floor - 1e-9 <= share == pytest.approx(floor + (1 - floor) * math.cos(math.pi * behind / 2) ** 2)
        assert cosine(step, min(2, progress + 0.1), warmup_steps=warmup, floor=floor) <= share + 1e-9
    else:
        assert share == min(1, (step + 1) / max(1, warmup))


@given(st.integers(1, 300), st.integers(0, 299), st.floats(0, 1), st.sampled_from(["cosine", "wsd", "noam"]), st.floats(0, 1), st.booleans())
def test_every_schedule_reaches_its_peak_and_then_only_falls(steps, warmup, floor, schedule, decay, by_time):
    """By updates, and where the run's end is an hour, of which each update takes as much."""
    warmup = min(warmup, steps - 1)
    told = TrainRecipe(steps=steps if not by_time else 10 ** 9, seconds=3600.0, warmup_steps=warmup, floor=floor, schedule=schedule, decay=decay)
    shares = [share(told, n, n / steps) for n in range(steps + 1)]
    peak = max(0, warmup - 1)
    assert shares[:peak] == pytest.approx([(n + 1) / warmup for n in range(peak)]) and shares[peak] == 1.0
    assert all(after <= before + 1e-9 for before, after in zip(shares[peak:], shares[peak + 1:]))
    if schedule == "cosine" or schedule == "wsd" and decay > 0:
        assert shares[-1] == pytest.approx(floor)
        assert schedule == "wsd" or shares[warmup] == 1.0


def test_the_schedule_in_numbers():
    assert [cosine(n, 0.0, warmup_steps=4, floor=0.1) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert cosine(52, 0.52, warmup_steps=4, floor=0.1) == pytest.approx(0.55), "in the middle between 0.04 and 1"
    assert cosine(50, 0.5, warmup_steps=0, floor=0.1) == pytest.approx(0.55) and cosine(99, 1.0, warmup_steps=4, floor=0.1) == pytest.approx(0.1)
    assert cosine(0, 0.0, warmup_steps=0, floor=0.1) == 1.0 and cosine(99, 7.0, warmup_steps=0, floor=0.0) == pytest.approx(0.0)


def test_a_trapezoid_in_numbers():
    trapezoid = [wsd(n, n / 10, warmup_steps=2, decay=0.4, floor=0.2) for n in range(11)]
    assert trapezoid == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert wsd(50, 1.7, warmup_steps=2, decay=0.4, floor=0.2) == pytest.approx(0.2)   # past its end it stays on its floor
    assert wsd(50, 0.0, warmup_steps=2, decay=1.0, floor=0.0) == 1.0 and wsd(50, 0.25, warmup_steps=0, decay=1.0, floor=0.0) == 0.75
    assert wsd(50, 1.0, warmup_steps=2, decay=0.0, floor=0.0) == 1.0                  # no decay at all


@given(st.integers(0, 500), st.floats(0, 2), st.integers(0, 100), st.floats(0, 1), st.floats(0, 1))
def test_a_trapezoid_is_flat_and_then_falls(step, progress, warmup, decay, floor):
    value = wsd(step, progress, warmup_steps=warmup, decay=decay, floor=floor) / min(1, (step + 1) / max(1, warmup))
    assert floor - 1e-9 <= value <= 1 + 1e-9
    if progress <= 1 - decay - 1e-9:
        assert value == pytest.approx(1.0)


def test_noam_is_the_papers_formula_over_its_peak():
    """d_model^-0.5 min(n^-0.5, n warmup^-1.5), with n from 1."""
    formula = [512 ** -0.5 * min(n ** -0.5, n * 4000 ** -1.5) for n in range(1, 20_000)]
    peak = max(formula)
    assert [noam(n, warmup_steps=4000) for n in range(0, 19_999, 97)] == pytest.approx([x / peak for x in formula[::97]])
    assert noam(3999, warmup_steps=4000) == 1.0 and noam(0, warmup_steps=0) == 1.0 and noam(3, warmup_steps=0) == 0.5


def test_the_recipe_chooses():
    told = TrainRecipe(schedule="cosine", warmup_steps=3, floor=0.3, decay=0.5)
    for step, progress in ((0, 0.0), (2, 0.4), (30, 0.8), (99, 1.0)):
        assert share(told, step, progress) == cosine(step, progress, warmup_steps=3, floor=0.3)
        assert share(TrainRecipe(schedule="wsd", warmup_steps=3, floor=0.3, decay=0.5), step, progress) == wsd(
            step, progress, warmup_steps=3, decay=0.5, floor=0.3)
        assert share(TrainRecipe(schedule="noam", warmup_steps=3), step, progress) == noam(step, warmup_steps=3)


@pytest.mark.parametrize(("name", "value", "told"), [
    ("decay", 1.5, "train.decay is 1.5; expected 0 to 1"), ("label_smoothing", 1.0, "expected 0 or more and less than 1"),
    ("z_loss", -1e-4, "expected 0 or more"), ("ema_decay", 1.0, "expected 0 or more and less than 1"), ("muon_momentum", -0.1, "expected 0 or more"),
    ("muon_learning_rate", -1.0, "expected 0 or more, or none"), ("spike_factor", -1.0, "expected 0 or more"),
])
def test_what_no_run_can_follow_is_refused(name, value, told):
    with pytest.raises(ConfigError, match=told):
        TrainRecipe(**{name: value})
