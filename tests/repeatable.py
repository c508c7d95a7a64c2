"""The same random numbers in each test, no gradients, and how near is near enough."""
from __future__ import annotations

import pytest
import torch


@pytest.fixture
def repeatable():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
