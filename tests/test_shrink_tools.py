"""Shrinking what other tools leave: their masks and zeros are imitated here, for they are no dependencies.

NNCF's filter pruning gives a layer a module ``pre_ops`` whose operand has the buffer ``_binary_filter_pruning_mask`` of (filters,); a
forward pass multiplies weight and bias by it. Stripped, the zeros are in weight and bias; the batch norm behind may have them, too.
TF-MOT's ``strip_pruning`` leaves the user's Keras layers, with zeros in their kernels.
"""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tinier
from tinier.edits.proof import random_inputs
from tinier.edits.slice import Slice
from tinier.modules.keras import KerasModule
from tinier.modules.keras_parts import keras_on_torch
from tinier.network import Network
from tinier.verbs import Smaller

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Keras says to its own developers when it is imported
    keras = keras_on_torch("these tests")
L = keras.layers

DEAD = [1, 4, 5]


class FilterPruningMask(nn.Module):
    """As NNCF's: (filters,) ones and zeros, applied to a weight along one dimension and to its bias."""

    def __init__(self, size: int, dim: int = 0) -> None:
        super().__init__()
        self.register_buffer("_binary_filter_pruning_mask", torch.ones(size))
        self._binary_filter_pruning_mask: Tensor
        self.dim = dim

    def forward(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        shape = [-1 if d == self.dim else 1 for d in range(weight.ndim)]
        mask = self._binary_filter_pruning_mask
        return weight * mask.view(shape), None if bias is None else bias * mask


class UpdateWeightAndBias(nn.Module):
    def __init__(self, operand: nn.Module) -> None:
        super().__init__()
        self.operand = operand


class NNCFConv2d(nn.Conv2d):
    """A convolution with the operations that run before it, as NNCF puts it into the user's model."""

    def __init__(self, inputs: int, outputs: int, size: int, **options: Any) -> None:
        super().__init__(inputs, outputs, size, **options)
        self.pre_ops = nn.ModuleDict({"0": UpdateWeightAndBias(FilterPruningMask(outputs))})

    def mask(self) -> Tensor:
        return self.get_buffer("pre_ops.0.operand._binary_filter_pruning_mask")

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.pre_ops["0"].operand(self.weight, self.bias)  # type: ignore[union-attr, operator]
        return self._conv_forward(input, weight, bias)


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first: Any = NNCFConv2d(3, 8, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(8)
        self.second: Any = NNCFConv2d(8, 10, 3, bias=bias)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def plain(layer: NNCFConv2d) -> nn.Conv2d:
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size[0])
    result = nn.Conv2d(*sizes, padding=layer.padding, bias=layer.bias is not None)  # type: ignore[arg-type]
    result.load_state_dict({k: v for k, v in layer.state_dict().items() if "." not in k})
    return result


def nncf(bias: bool, norms: bool, stripped: bool) -> Net:
    torch.manual_seed(0)
    model = Net(bias).eval()
    with torch.no_grad():
        for tensor in (model.norm.weight, model.norm.running_var):
            tensor.uniform_(0.5, 1.5)  # type: ignore[union-attr]
        for tensor in (model.norm.bias, model.norm.running_mean):
            tensor.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
        model.first.mask()[DEAD] = 0
        if norms:  # prune_batch_norms, its default
            model.norm.weight[DEAD] = 0
            model.norm.bias[DEAD] = 0
        if stripped:
            model.first.weight[DEAD] = 0
            if model.first.bias is not None:
                model.first.bias[DEAD] = 0
            model.first = plain(model.first)
            model.second = plain(model.second)
    return model


def widths(smaller: Smaller) -> list[int]:
    return [len(edit.kept) for edit in smaller.plan.edits if isinstance(edit, Slice)]


def same(smaller: Smaller, reference: Network) -> None:
    inputs = random_inputs(smaller.original, seed=11)
    for found, wanted in zip(smaller.network(inputs), reference(inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_filters_that_nncf_pruned(bias: bool, norms: bool, stripped: bool) -> None:
    model = nncf(bias, norms, stripped)
    smaller = tinier.shrink(model, torch.randn(2, 3, 8, 8))
    width = 5
    if not norms and not bias:
        # What the batch norm adds is a constant, which has nowhere to go, for the reader has no bias; but ReLU makes some zero.
        norm: Any = model.norm
        deviation = (norm.running_var + norm.eps).sqrt()
        constants = norm.bias - norm.weight * norm.running_mean / deviation
        width = 8 - int((constants[DEAD] <= 0).sum())
        assert 5 < width < 8
    assert widths(smaller) == [width]
    assert type(smaller.model) is Net
    assert smaller.model.first.weight.shape == (width, 3, 3, 3)
    assert stripped or smaller.model.first.mask().shape == (width,)  # type: ignore[operator]
    same(smaller, Network(model, smaller.original.example))


def test_single_weights_that_nncf_masked_stay_zero() -> None:
    """Magnitude sparsity: zeros all over, and no channel that is dead."""
    model = nncf(True, False, True)
    with torch.no_grad():
        model.second.weight.mul_(model.second.weight.abs() > model.second.weight.abs().median())
    smaller = tinier.shrink(model, torch.randn(2, 3, 8, 8))
    assert widths(smaller) == [5]
    zeros = (smaller.model.second.weight == 0).float().mean()  # type: ignore[union-attr]
    assert 0.4 < float(zeros) < 0.6


def convolutional() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            L.Conv2D(8, 3, padding="same", name="first"),
            L.BatchNormalization(name="norm"),
            L.ReLU(),
            L.Conv2D(10, 3, name="second"),
            L.ReLU(),
            L.GlobalAveragePooling2D(),
            L.Dense(6, activation="relu", name="hidden"),
            L.Dense(4, name="head"),
        ]
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("also", [(), ("first.bias",), ("norm.gamma", "norm.beta")])
def test_zeros_that_tf_mot_left(also: tuple[str, ...]) -> None:
    model = convolutional()
    variables = KerasModule(model).variables
    generator = np.random.default_rng(0)
    for variable in variables.values():  # as after training
        spread = generator.uniform(0.1, 0.5, variable.shape).astype(np.float32)
        variable.assign(variable.value + torch.from_numpy(spread))
    for name in ("first.kernel", *also):
        value = variables[name].value.detach().clone()
        value[..., DEAD] = 0
        variables[name].assign(value)
    kernel = variables["hidden.kernel"].value.detach().clone()
    kernel[:, [0, 2]] = 0  # two neurons, whose biases are not pruned
    variables["hidden.kernel"].assign(kernel)
    smaller = tinier.shrink(model)
    # The second convolution takes up what the norm adds: it has a bias and does not pad.
    assert sorted(widths(smaller)) == [4, 5]
    made: Any = smaller.model
    assert isinstance(made, keras.Sequential)
    assert made.get_layer("first").filters == 5 and made.get_layer("hidden").units == 4
    same(smaller, Network(KerasModule(model), smaller.original.example))
