"""Rates of halfbyte's own operators: measured where they run, and of an order that arithmetic allows."""

import pytest
import torch

from halfbyte.ops import native
from halfbyte.plan import engine_rates


@pytest.mark.skipif(not native.multiplies(torch.float32), reason="no native engine here")
def test_rates_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_rates, "BUDGET", 0.01)
    rates = engine_rates.measure(torch.float32)
    assert set(rates) == {"quantized", "few", "dense", "loss", "attention"}
    assert all(1e8 < rate < 1e15 for rate in rates.values())


def test_best_seconds_leaves_the_first_call_out() -> None:
    calls = []

    def call() -> None:
        calls.append(1)

    assert 0 <= engine_rates.best_seconds(call, budget=0.0) < 1
    assert len(calls) == 3
