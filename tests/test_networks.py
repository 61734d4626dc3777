"""The conformance set itself: seeded, deterministic, traceable, and its graph computes what the module does."""

import pytest
import torch

from networks import NETWORKS, build, inputs


@pytest.mark.parametrize("name", NETWORKS)
def test_seeded_and_traced(name: str) -> None:
    network, twin = build(name), build(name)
    assert not network.module.training
    batch = inputs(name, batch=5, seed=3)
    outputs = network(batch)
    for one, two in zip(outputs, twin(batch), strict=True):
        assert torch.equal(one, two)
        assert torch.isfinite(one).all()
        assert len(one) == 5

    traced = network.traced
    assert traced.batched
    assert len(traced.outputs) == len(outputs)
    for one, two in zip(outputs, traced.module(**batch), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
