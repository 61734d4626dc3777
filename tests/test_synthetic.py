"""Recovery without data: inputs from the statistics of batch norms."""

import pytest
import torch
from torch import Tensor, nn

import tinier
from networks import build
from tinier.errors import InputError
from tinier.network import Network
from tinier.recovery.synthetic import synthetic_inputs
from toy import TinyCNN, images, trained


class Normed(nn.Module):
    """A norm of the inputs themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(x))
        return found


def test_inputs_have_the_statistics_that_the_norm_remembers() -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    model.norm.running_mean = torch.tensor([0.0, 1.0, -2.0, 5.0, 0.3, 0.0])
    model.norm.running_var = torch.tensor([1.0, 4.0, 0.25, 2.0, 1.0, 9.0])
    network = Network(model, {"x": torch.randn(2, 6)})
    found = synthetic_inputs(network, 200, batch=100, steps=400, classes=0.0)
    x = torch.cat([inputs["x"] for inputs, _ in found.batches(64)])
    assert x.shape == (200, 6) and not found.labelled
    torch.testing.assert_close(x.mean(0), model.norm.running_mean, rtol=0.02, atol=0.02)
    torch.testing.assert_close(x.var(0, correction=0), model.norm.running_var, rtol=0.03, atol=0.0)
    again = synthetic_inputs(network, 200, batch=100, steps=400, classes=0.0)
    assert found.digest() == again.digest()


def test_a_pruned_network_recovers_without_data() -> None:
    model = trained(TinyCNN)
    x, y = images(700, 2)
    pruned = tinier.prune(model, x[:2], keep=0.3)

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network.eval()(x).argmax(1) == y).float().mean())

    done = tinier.recover(pruned, None, epochs=20, batch=32)
    assert any("synthetic" in note for note in done.notes)
    before, after, original = (accuracy(m) for m in (pruned.model, done.model, model))
    assert after > before + 0.5 * (original - before)


@pytest.mark.parametrize(
    ("name", "message"), [("mlp", "no batch norms"), ("causal_lm", "only floats")]
)
def test_where_nothing_can_be_made_up(name: str, message: str) -> None:
    network = build(name)
    with pytest.raises(InputError, match=message):
        synthetic_inputs(network, 8)
