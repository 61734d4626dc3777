"""After quantization-aware training: the trained float weights in the user's class, on disk and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tinier
from tinier.edits.assign import Assign, Fold
from tinier.edits.base import Plan, Values
from tinier.edits.unfold import unfolded
from tinier.errors import InputError, RefusedError
from tinier.network import Network
from toy import TinyCNN, images, trained


class Mixed(nn.Module):
    """Norms behind a convolution with a bias, one without, a depthwise one and a linear layer; one channel's γ is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.b_norm = (
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
            nn.BatchNorm2d(6, eps=0.1),
        )
        self.c, self.c_norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.d = nn.Linear(8, 3)
        with torch.no_grad():
            for norm in (self.a_norm, self.b_norm, self.c_norm):
                norm.weight.uniform_(-2, 2)
                norm.bias.normal_()
                norm.running_mean.normal_()  # type: ignore[union-attr]
                norm.running_var.uniform_(0.1, 4)  # type: ignore[union-attr]
            self.b_norm.weight[2] = 0

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.b_norm(self.b(torch.relu(self.a_norm(self.a(x))))))
        return self.d(torch.relu(self.c_norm(self.c(y.mean((2, 3))))))


def moved(network: Network) -> Network:
    """A copy with every parameter moved at random."""
    result = network.copy()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in result.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return result


def test_what_is_unfolded_folds_to_the_same() -> None:
    torch.manual_seed(0)
    x, _ = images(16, 3)
    network = Network(Mixed().eval(), {"x": x[:2]})
    folded = moved(Plan((Fold(),)).apply(network))
    found = unfolded(network, folded)
    assert type(found.module) is Mixed
    expected = folded({"x": x})[0]
    assert torch.allclose(found({"x": x})[0], expected, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(network({"x": x})[0], expected, rtol=0.1)
    buffers = dict(network.module.named_buffers())
    for name, buffer in found.module.named_buffers():
        assert torch.equal(buffer, buffers[name]), "statistics stay"
    gamma = found.module.get_parameter("b_norm.weight")
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(gamma[kept], network.module.get_parameter("b_norm.weight")[kept])
    variance = found.module.get_buffer("b_norm.running_var")[2]
    assert float(gamma[2].detach()) == pytest.approx(float((variance + 0.1).sqrt()))
    same = unfolded(network, Plan((Fold(),)).apply(network)).module.get_parameter("a.weight")
    assert torch.allclose(same, network.module.get_parameter("a.weight"), rtol=1e-5)


def test_what_has_no_place_is_refused() -> None:
    network = Network(nn.Sequential(nn.Linear(4, 3, bias=False)), {"input": torch.randn(2, 4)})
    bias = Assign("0.bias", Values(torch.ones(3)), "0.weight")
    with pytest.raises(RefusedError, match=r"no place for 0\.bias"):
        unfolded(network, Plan((Fold(), bias)).apply(network))


def test_trained_weights_are_saved_and_come_back(tmp_path: Path) -> None:
    model, (x, _) = trained(TinyCNN), images(256, 2)
    pruned = tinier.prune(model, (x[:2],), keep=0.7)
    quantized = tinier.quantize(pruned, data=x, bits=2, activations=4)
    once = tinier.recover(quantized, x, epochs=5)
    assert once.trainable is not None and type(once.trainable.module) is type(pruned.model)
    # The float parent of the trained integers is near to them, the network from before is not.
    batch = {"x": x}
    answer = once.network(batch)[0]
    near, far = (float((one(batch)[0] - answer).norm()) for one in (once.trainable, pruned.network))
    assert near < far
    tinier.save(once, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    own = dict(once.trainable.module.state_dict())
    before = pruned.network.module.state_dict()
    assert all(torch.equal(stored[name], own[name]) for name in own)
    assert not torch.equal(stored["conv1.weight"], before["conv1.weight"])
    again = tinier.load(tmp_path / "out", into=model, example=(x[:2],))
    assert torch.equal(again.network(batch)[0], once.trainable(batch)[0])
    both = tinier.load(tmp_path / "out", into=model, example=(x[:2],), quantized=True)
    assert torch.equal(both.network(batch)[0], answer) and both.plan == once.plan
    assert both.trainable is not None
    assert torch.equal(both.trainable(batch)[0], once.trainable(batch)[0])
    # Training goes on from there.
    further = tinier.recover(both, x, epochs=1)
    assert torch.equal(further.plan.apply(further.original)(batch)[0], further.network(batch)[0])


class Bare(nn.Module):
    """A convolution that has no bias, so that a correction gives it one that the class has no place for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, bias=False)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def test_weights_without_a_place_are_those_of_the_folded_graph(tmp_path: Path) -> None:
    model, (x, _) = trained(Bare), images(256, 2)
    quantized = tinier.quantize(model, (x[:2],), x, bits=2, activations=4)
    given = [e.tensor for e in quantized.plan.edits if isinstance(e, Assign) and e.reader]
    assert given, "the correction gave a bias"
    once = tinier.recover(quantized, x, epochs=2)
    assert any("not of its class" in note for note in once.notes)
    batch = {"x": x}
    tinier.save(once, tmp_path / "out")
    assert set(given) <= load_file(tmp_path / "out" / "model.safetensors").keys()
    both = tinier.load(tmp_path / "out", into=model, example=(x[:2],), quantized=True)
    assert once.trainable is not None and both.trainable is not None
    assert torch.equal(both.network(batch)[0], once.network(batch)[0])
    assert torch.equal(both.trainable(batch)[0], once.trainable(batch)[0])
    twice = tinier.recover(both, x, epochs=1)
    assert torch.equal(twice.plan.apply(twice.original)(batch)[0], twice.network(batch)[0])


def test_without_training_the_float_network_comes_back(tmp_path: Path) -> None:
    model, (x, _) = trained(TinyCNN), images(64, 2)
    quantized = tinier.quantize(model, (x[:2],), x)
    tinier.save(quantized, tmp_path / "out")
    both = tinier.load(tmp_path / "out", into=model, example=(x[:2],), quantized=True)
    with torch.no_grad():
        assert torch.equal(both.model(x), quantized.model(x))
        assert both.trainable is not None and torch.equal(both.trainable.module(x), model(x))
    tinier.save(tinier.prune(model, (x[:2],), keep=0.7), tmp_path / "pruned")
    with pytest.raises(InputError, match="no quantized network"):
        tinier.load(tmp_path / "pruned", into=model, example=(x[:2],), quantized=True)
