"""Keras models without some of their activation functions: they stay Keras models."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tinier
from tinier.edits.base import Plan
from tinier.edits.drop import Drop
from tinier.graph.activations import activations, straightened
from tinier.modules.keras_parts import keras_on_torch
from tinier.sources.load import load
from tinier.statistics.lines import fit_lines

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Keras says to its own developers when it is imported
    keras = keras_on_torch("these tests")
L = keras.layers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def block(activation: str | None, bias: bool = True, last: str | None = None) -> Any:
    """A feed-forward block with a sum around it."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    x = L.Dense(32, activation=activation, use_bias=bias, name="up")(inputs)
    if activation is None:
        x = L.Activation("gelu", name="act")(x)
    x = L.Dense(8, activation=last, use_bias=bias, name="down")(x)
    return keras.Model(inputs, L.Dense(3, name="head")(L.Add()([inputs, x])))


def data() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 5, 8)).astype(np.float32)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    ("activation", "bias", "last"),
    [("relu", True, None), ("silu", False, None), (None, True, None), ("relu", True, "tanh")],
)
def test_lines_and_merged_layers(
    activation: str | None, bias: bool, last: str | None, merge: bool, tmp_path: Path
) -> None:
    model = block(activation, bias, last)
    x = torch.from_numpy(data())
    before = [variable.value.detach().clone() for variable in model.variables]
    network = load(model)
    (one, *_) = activations(network.traced)
    line = fit_lines(network, [{network.traced.inputs[0]: x}])[one.name].line
    (wanted,) = straightened(network.traced, {one: line}, {network.traced.inputs[0]: x})
    count = {} if merge else {"count": 1, "score": "fit"}
    smaller = tinier.linearize(model, None, data(), merge=merge, **count)  # type: ignore[arg-type]
    if last is not None and not merge:
        return  # the other function is straighter
    assert [edit.kind for edit in smaller.plan.edits] == ["linearize", "merge"][: 1 + merge]
    assert isinstance(smaller.model, keras.Model)
    made: Any = smaller.model
    torch.testing.assert_close(made(x), wanted, rtol=1e-4, atol=1e-5)
    if merge:
        assert made.get_layer("up").kernel.shape == (8, 8)
        assert made.get_layer("up").activation is model.get_layer("down").activation
    tinier.save(smaller, tmp_path / "straight.keras")
    again = keras.saving.load_model(tmp_path / "straight.keras")
    torch.testing.assert_close(again(x), made(x), rtol=0, atol=0)
    for variable, value in zip(model.variables, before, strict=True):
        assert torch.equal(variable.value, value)


def test_convolutions_take_lines_and_nothing_leaves_for_nothing() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            L.Conv2D(4, 3, activation="relu"),
            L.Conv2DTranspose(4, 3, activation="relu"),
            L.Dense(2),
        ]
    )
    x = np.random.default_rng(0).normal(size=(32, 9, 9, 3)).astype(np.float32)
    kept = tinier.linearize(model, None, x)
    assert kept.plan == Plan() and isinstance(kept.model, keras.Model)
    smaller = tinier.linearize(model, None, x, count=2)
    assert isinstance(smaller.model, keras.Sequential)
    made: Any = smaller.model
    assert [layer.activation.__name__ for layer in made.layers] == ["linear"] * 3


def test_nested_models_with_a_sum_inside_are_dropped(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)

    def inner(name: str) -> Any:
        inputs = keras.Input((8,))
        hidden = L.Dense(16, activation="relu", name="up")(inputs)
        return keras.Model(inputs, L.Add()([inputs, L.Dense(8, name="down")(hidden)]), name=name)

    inputs = keras.Input((8,))
    x = L.Dense(8, name="stem")(inputs)
    for number in range(3):
        x = inner(f"block{number}")(x)
    model = keras.Model(inputs, L.Dense(2, name="head")(x))
    smaller = tinier.prune(model, depth=1, keep=1.0)
    (drop,) = smaller.plan.edits
    assert isinstance(drop, Drop) and isinstance(smaller.model, keras.Model)
    x = torch.randn(5, 8)
    wanted = model.get_layer("stem")(x)
    for number in range(3):
        if f"block{number}" != drop.block:
            wanted = model.get_layer(f"block{number}")(wanted)
    wanted = model.get_layer("head")(wanted)
    tinier.save(smaller, tmp_path / "shallow.keras")
    again = keras.saving.load_model(tmp_path / "shallow.keras")
    torch.testing.assert_close(again(x), wanted)
    assert again.count_params() == model.count_params() - model.get_layer("block0").count_params()
