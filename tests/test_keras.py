"""Keras 3 in, smaller Keras 3 out: configs, weights, files, other backends, refusals. Tiny models of each kind of layer."""

import copy
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tinier
from tinier.edits.base import Plan
from tinier.edits.slice import Slice, prove
from tinier.errors import ModelError, OutputError, RefusedError
from tinier.graph.groups import channel_groups
from tinier.modules.keras import KerasModule
from tinier.modules.keras_parts import keras_on_torch
from tinier.network import Network
from tinier.sources.keras import read_keras, write_keras
from tinier.sources.load import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Keras says to its own developers when it is imported
    keras = keras_on_torch("these tests")
L = keras.layers

# Keras converts variables to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@keras.saving.register_keras_serializable("tests")
class Scaled(L.Layer):  # type: ignore[name-defined]
    """A user's own layer with a width in its config."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.width = width

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(self.width,), initializer="ones", name="scale")

    def call(self, x: Any) -> Any:
        return x * self.scale

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


class Subclassed(keras.Model):  # type: ignore[name-defined]
    """A model that builds its layers itself, from a width in its config."""

    def __init__(self, width: int = 12, **options: Any) -> None:
        super().__init__(**options)
        self.width = width
        self.first, self.last = L.Dense(width, activation="relu"), L.Dense(4)

    def call(self, x: Any) -> Any:
        return self.last(self.first(x))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


def sequence(*layers: Any) -> Any:
    return keras.Sequential(list(layers))


def nested() -> Any:
    inputs = keras.Input((6, 6, 8))
    body = L.BatchNormalization()(L.Conv2D(12, 3, padding="same", name="body")(inputs))
    inner = keras.Model(inputs, body, name="inner")
    tail = sequence(keras.Input((12,)), L.Dense(10, activation="relu"), L.Dense(6))
    image = keras.Input((6, 6, 3), name="image")
    x = inner(L.Conv2D(8, 3, padding="same", activation="relu", name="stem")(image))
    return keras.Model(image, L.Dense(5)(tail(L.GlobalAveragePooling2D()(x))))


def shuffle() -> Any:
    image = keras.Input((6, 6, 3))
    x = L.Conv2D(12, 3, groups=3, padding="same", name="grouped")(L.Conv2D(12, 1)(image))
    x = L.Permute((1, 2, 4, 3))(L.Reshape((6, 6, 3, 4), name="split")(x))
    x = L.Conv2D(12, 3, groups=4)(L.Reshape((6, 6, 12))(x))
    return keras.Model(image, L.Dense(5)(L.GlobalAveragePooling2D()(x)))


def attention(layer: Any) -> Any:
    tokens = keras.Input((5, 12))
    x = L.Dense(16)(tokens)
    y = L.LayerNormalization()(x)
    x = L.Add()([x, layer(y, y)])
    x = L.Add()([x, L.Dense(16)(L.Dense(24, activation="gelu")(L.LayerNormalization()(x)))])
    return keras.Model(tokens, L.Dense(5)(L.GlobalAveragePooling1D()(x)))


def several() -> Any:
    a, b = keras.Input((5,), name="a"), keras.Input((7,), dtype="int32", name="b")
    words = L.Flatten()(L.Embedding(20, 8)(b))
    x = L.Dense(12, activation="relu")(L.Concatenate()([L.Dense(8)(a), words]))
    return keras.Model({"a": a, "b": b}, {"p": L.Dense(3)(x), "q": L.Dense(2)(x)})


def unet() -> Any:
    image = keras.Input((8, 8, 3))
    a = L.Conv2D(8, 3, padding="same", activation="relu")(image)
    b = L.Conv2D(12, 3, strides=2, padding="same", activation="relu")(a)
    c = L.Concatenate()([a, L.Conv2DTranspose(8, 2, strides=2)(b)])
    return keras.Model(image, L.Conv2D(2, 1)(L.Conv2D(8, 3, padding="same")(c)))


def shared() -> Any:
    a, b, layer = keras.Input((6,)), keras.Input((6,)), L.Dense(12)
    return keras.Model([a, b], L.Dense(3)(L.Subtract()([layer(a), layer(b)])))


def operations() -> Any:
    x = keras.Input((6,))
    y = L.Dense(12)(x)
    first, second = keras.ops.split(y, 2, axis=-1)
    z = keras.ops.reshape(first * second + keras.ops.relu(second), (-1, 6))
    return keras.Model(x, L.Dense(3)(Scaled(6)(z)))


IMAGE, SERIES = (6, 6, 3), (2, 6)
MODELS: dict[str, Callable[[], Any]] = {
    "cnn": lambda: sequence(
        keras.Input(IMAGE), L.Conv2D(8, 3), L.BatchNormalization(), L.PReLU(shared_axes=[1, 2]),
        L.Conv2D(12, 3), L.Flatten(), L.Dense(10), L.Dense(4),
    ),
    "nested": nested,
    "attention": lambda: attention(L.MultiHeadAttention(4, 8, value_dim=6)),
    "grouped queries": lambda: attention(L.GroupQueryAttention(8, 4, 2)),
    "several": several,
    "unet": unet,
    "shared": shared,
    "operations": operations,
    "recurrent": lambda: sequence(
        keras.Input(SERIES), L.LSTM(12, return_sequences=True), L.GRU(10, return_sequences=True),
        L.SimpleRNN(8), L.Dense(4),
    ),
    "bidirectional": lambda: sequence(
        keras.Input(SERIES), L.Bidirectional(L.GRU(8), merge_mode="sum"), L.Dense(4)
    ),
    "cells": lambda: sequence(
        keras.Input(SERIES), L.RNN([L.LSTMCell(8), L.GRUCell(6)]), L.Dense(4)
    ),
    "text": lambda: sequence(
        keras.Input((7,), dtype="int32"), L.Embedding(30, 12), L.Conv1D(8, 3, activation="relu"),
        L.GlobalMaxPooling1D(), L.Dense(4),
    ),
    "volumes": lambda: sequence(
        keras.Input((4, 4, 4, 2)), L.Conv3D(8, 3), L.Conv3DTranspose(6, 2),
        L.GlobalAveragePooling3D(), L.Dense(4),
    ),
    "separable": lambda: sequence(
        keras.Input((8, 8, 3)), L.SeparableConv2D(8, 3, depth_multiplier=2),
        L.DepthwiseConv2D(3, depth_multiplier=2), L.BatchNormalization(scale=False),
        L.SeparableConv2D(6, 1), L.GlobalAveragePooling2D(), L.Dense(4),
    ),
    "signals": lambda: sequence(
        keras.Input((12, 3)), L.SeparableConv1D(8, 3), L.DepthwiseConv1D(3), L.Conv1DTranspose(6, 2),
        L.GroupNormalization(2), L.GlobalMaxPooling1D(), L.Dense(4),
    ),
    "einsum": lambda: sequence(
        keras.Input((6, 8)), L.EinsumDense("abc,cde->abde", output_shape=(None, 3, 5), bias_axes="de"),
        L.EinsumDense("abde,def->abf", output_shape=(None, 7), bias_axes="f"),
        L.RMSNormalization(), L.GlobalAveragePooling1D(), L.Dense(4),
    ),
    "time": lambda: sequence(
        keras.Input((2, 4, 4, 2)), L.TimeDistributed(L.Conv2D(4, 3)), L.ConvLSTM2D(4, 1),
        L.GlobalAveragePooling2D(), L.Dense(4),
    ),
    "generator": lambda: sequence(
        keras.Input((6,)), L.Dense(3 * 3 * 8), L.Reshape((3, 3, 8)),
        L.Conv2DTranspose(6, 2, strides=2), L.Conv2D(3, 1),
    ),
}  # fmt: skip


def build(name: str) -> Any:
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    return stirred(model)


def stirred(model: Any) -> Any:
    """No two channels alike, so that a wrong cut shows."""
    generator = np.random.default_rng(0)
    for variable in model.variables:
        if variable.value.is_floating_point():
            variable.assign(
                variable.value
                + torch.tensor(0.2 * generator.random(variable.shape), dtype=torch.float32)
            )
    return model


def half(network: Network) -> Plan:
    """A plan that cuts about half of every group, at random."""
    generator = torch.Generator().manual_seed(0)
    groups = [group for group in channel_groups(network.traced).groups if group.size > 1]
    return Plan(
        tuple(
            Slice.of(g, torch.randperm(g.size, generator=generator)[: max(1, g.size // 2)].tolist())
            for g in groups
        )
    )


@pytest.mark.parametrize("name", MODELS)
def test_comes_back_as_keras(name: str, tmp_path: Path) -> None:
    model = build(name)
    before = [variable.value.detach().clone() for variable in model.variables]
    network = load(model)
    assert network.traced.batched
    plan = half(network)
    assert plan.edits
    smaller = plan.apply(network)
    assert [note[:30] for note in smaller.notes] == ["equals its masked reference to"]
    assert isinstance(smaller.module, KerasModule) and type(smaller.module.model) is type(model)
    assert prove(network, smaller, plan) <= 1e-5
    for variable, value in zip(model.variables, before, strict=True):
        assert torch.equal(variable.value, value)  # the user's model is as it was
    # Its config is what is on disk, and plain Keras builds the same from it.
    write_keras(smaller, tmp_path / "small.keras")
    again = Network(KerasModule(read_keras(tmp_path / "small.keras")), smaller.example)
    for found, wanted in zip(again(smaller.example), smaller(smaller.example), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_config_has_the_new_widths() -> None:
    network = load(build("nested"))
    groups = {group.name: group for group in channel_groups(network.traced).groups}
    plan = Plan((Slice.of(groups["stem"], [0, 3, 5]), Slice.of(groups["inner.body"], range(7))))
    smaller = plan.apply(network).module
    assert isinstance(smaller, KerasModule)
    stem = smaller.model.get_layer("stem")
    assert stem.filters == 3 and stem.get_config()["filters"] == 3
    inner = smaller.model.get_layer("inner")
    assert inner.input_shape == (None, 6, 6, 3) and inner.get_layer("body").filters == 7
    np.testing.assert_array_equal(
        stem.kernel.value.detach().numpy(),
        network.module.get_parameter("stem.kernel").detach().numpy()[..., [0, 3, 5]],
    )


def test_heads_and_groups() -> None:
    network = load(build("attention"))
    heads = next(g for g in channel_groups(network.traced).groups if g.kind == "head")
    smaller = Plan((Slice.of(heads, [1, 2]),)).apply(network).module
    assert isinstance(smaller, KerasModule)
    layer = next(part for part in smaller.model.layers if "attention" in part.name)
    assert layer.num_heads == 2 and layer.key_dim == 8
    network = load(stirred(shuffle()))
    grouped = half(network).apply(network).module
    assert isinstance(grouped, KerasModule)
    layer = grouped.model.get_layer("grouped")
    assert (layer.groups, layer.filters) == (1, 2)
    assert grouped.model.get_layer("split").target_shape == (6, 6, 1, 2)


def test_own_classes() -> None:
    keras.utils.set_random_seed(0)
    model = Subclassed()
    example = torch.randn(2, 6)
    model(example)
    network = load(stirred(model), example)
    plan = half(network)
    smaller = plan.apply(network).module
    assert isinstance(smaller, KerasModule) and isinstance(smaller.model, Subclassed)
    assert smaller.model.width == 6


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("inner", ["LSTM", "GRU"])
def test_both_directions_keep_the_same_width(inner: str, uniform: bool, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    layer = L.Bidirectional(getattr(L, inner)(16, return_sequences=True))
    with torch.no_grad():  # one direction alone would lose more than the other
        model = sequence(keras.Input((4, 5)), layer, L.Flatten(), L.Dense(3))
        for variable in layer.backward_layer.trainable_variables:
            variable.assign(variable.value * 3)
    smaller = tinier.prune(model, keep=0.5, uniform=uniform)
    slices = [edit for edit in smaller.plan.edits if isinstance(edit, Slice)]
    assert len(slices) == 2 and len(slices[0].kept) == len(slices[1].kept) < 16
    tinier.save(smaller, tmp_path / "smaller.keras")
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    again = keras.saving.load_model(tmp_path / "smaller.keras")
    torch.testing.assert_close(again(x), smaller.model(x), rtol=1e-4, atol=1e-5)


def test_what_only_training_uses_is_cut_along() -> None:
    keras.utils.set_random_seed(0)
    layer = L.SpectralNormalization(L.Dense(16))
    model = sequence(keras.Input((6,)), layer, L.ReLU(), L.Dense(3))
    smaller = tinier.prune(model, keep=0.5)
    made: Any = smaller.model
    (kept,) = (edit.kept for edit in smaller.plan.edits if isinstance(edit, Slice))
    vector = made.layers[0].vector_u.value
    assert torch.equal(vector, layer.vector_u.value[:, list(kept)])
    made(torch.zeros(2, 6), training=True)


def test_layers_without_weights_are_refused_before_anything_runs() -> None:
    model = Subclassed(16)
    for built in (False, True):
        if built:
            with pytest.warns(UserWarning, match="despite not being actually built"):
                model.build((None, 8))  # the model, not its layers
        with pytest.raises(
            ModelError, match=r"have no weights yet; call it once on data: model\(x\)"
        ):
            load(model, np.zeros((2, 8), np.float32))
        assert not model.first.built
    model(np.zeros((2, 8), np.float32))
    assert tinier.prune(model, np.zeros((2, 8), np.float32)).kept


def test_flat_models_have_no_blocks_and_are_told_so() -> None:
    inputs = keras.Input((8,))
    model = keras.Model(inputs, L.Dense(3)(L.Add()([inputs, L.Dense(8)(inputs)])))
    with pytest.raises(RefusedError, match="module of its own"):
        tinier.prune(model, depth=1)


def test_what_keras_cannot_rebuild_comes_back_as_graph(tmp_path: Path) -> None:
    x = keras.Input((6,))
    y = L.Dense(12)(x)
    network = load(stirred(keras.Model(x, L.Dense(3)(y[:, :6] * y[:, 6:]))))
    plan = half(network)
    smaller = plan.apply(network)
    assert isinstance(smaller.module, torch.fx.GraphModule)
    assert any("traced graph" in note for note in smaller.notes)
    assert prove(network, smaller, plan) <= 1e-5
    with pytest.raises(ModelError, match="no Keras model: what is left is the traced graph"):
        write_keras(smaller, tmp_path / "small.keras")


def test_channels_first() -> None:
    image = keras.Input((3, 6, 6))
    options = {"data_format": "channels_first"}
    x = L.Conv2D(8, 3, padding="same", **options)(image)
    x = L.MaxPooling2D(2, **options)(L.BatchNormalization(axis=1)(x))
    x = L.Conv2D(6, 3, strides=2, padding="same", **options)(x)
    network = load(stirred(keras.Model(image, L.Dense(2)(L.GlobalAveragePooling2D(**options)(x)))))
    plan = half(network)
    smaller = plan.apply(network)
    assert isinstance(smaller.module, KerasModule) and prove(network, smaller, plan) <= 1e-5


def test_dropout_is_off_in_evaluation_and_on_in_training() -> None:
    network = load(stirred(sequence(keras.Input((8,)), L.Dense(16), L.Dropout(0.5), L.Dense(2))))
    module, x = network.module, network.example
    with torch.no_grad():
        module.eval()
        assert torch.equal(module(**x), module(**x))
        module.train()
        assert not torch.equal(module(**x), module(**x))


def test_verbs(tmp_path: Path) -> None:
    file = tmp_path / "model.keras"
    build("cnn").save(file)
    smaller = tinier.prune(file, keep=0.5)
    assert isinstance(smaller.model, keras.Sequential)
    costs = smaller.as_dict()["macs"]
    assert costs["after"] <= 0.5 * costs["before"]
    # It trains in Keras.
    kernels = [v.value for v in smaller.model.trainable_variables if v.name == "kernel"]
    before = [value.detach().clone() for value in kernels]
    smaller.model.compile(optimizer="sgd", loss="mse")
    smaller.model.fit(np.ones((4, *IMAGE), "float32"), np.ones((4, 4), "float32"), verbose=0)
    assert all(not torch.equal(a, b) for a, b in zip(before, kernels, strict=True))
    # It is saved and rebuilt without its class.
    tinier.save(smaller, tmp_path / "saved")
    again = tinier.load(tmp_path / "saved", into=file)
    for a, b in zip(
        again.network(again.network.example), smaller.network(again.network.example), strict=True
    ):
        assert torch.equal(a, b)
    artifact = tinier.export(again, tmp_path / "onnx", target="onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact.files[0], providers=["CPUExecutionProvider"])
    (name, example), *_ = again.network.example.items()
    (found,) = session.run(None, {name: example.numpy()})
    np.testing.assert_allclose(
        found, again.network({name: example})[0].numpy(), rtol=1e-4, atol=1e-5
    )


def test_copies_are_independent() -> None:
    module = load(build("nested")).module
    copied = copy.deepcopy(module)
    assert isinstance(copied, KerasModule) and list(copied.variables) == list(module.variables)  # type: ignore[arg-type]
    with torch.no_grad():
        copied.get_parameter("stem.kernel").zero_()
    assert float(copied.model.get_layer("stem").kernel.value.detach().abs().max()) == 0
    assert float(module.get_parameter("stem.kernel").detach().abs().max()) > 0


PLAIN = """
import sys
import numpy as np, keras
assert keras.backend.backend() == sys.argv[1] and "tinier" not in sys.modules
for name in sys.argv[3:]:
    model = keras.saving.load_model(f"{sys.argv[2]}/{name}.keras", compile=False)
    x = np.load(f"{sys.argv[2]}/{name}.npy")
    np.save(f"{sys.argv[2]}/{name}_y.npy", np.asarray(model.predict(x, verbose=0)))
"""


def in_fresh_process(backend: str, code: str, *arguments: str) -> str:
    """What Python code prints in a process of its own, with Keras on a backend."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Not OpenVINO, whose backend of Keras is off by 3e-3 on any model.
@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_plain_keras_loads_it_on_any_backend(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    wanted: dict[str, Tensor] = {}
    for name in ("cnn", "text"):
        network = load(build(name))
        smaller = half(network).apply(network)
        write_keras(smaller, tmp_path / f"{name}.keras")
        (example,) = smaller.example.values()
        np.save(tmp_path / f"{name}.npy", example.numpy())
        (wanted[name],) = smaller(smaller.example)
    in_fresh_process(backend, PLAIN, backend, str(tmp_path), *wanted)
    for name, value in wanted.items():
        found = torch.from_numpy(np.load(tmp_path / f"{name}_y.npy"))
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_other_backend_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    file = tmp_path / "model.keras"
    build("text").save(file)
    code = (
        "import sys, keras, tinier\n"
        "try:\n    tinier.prune(sys.argv[1])\n"
        "except tinier.TinierError as error:\n    print(error)\n"
    )
    said = in_fresh_process("openvino", code, str(file))
    assert "runs on openvino: set the environment variable KERAS_BACKEND=torch" in said


def rewritten(file: Path, change: Callable[[str, bytes], bytes], **more: bytes) -> None:
    """Write a .keras file anew with other members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (members | more).items():
            archive.writestr(name, content)


def test_files_that_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.keras"
    with pytest.raises(ModelError, match="no such file"):
        load(file)
    file.write_bytes(b"not a zip archive")
    with pytest.raises(ModelError, match=r"not a \.keras file, which is a zip archive"):
        load(file)
    for member in ("../evil.py", "/etc/evil", "evil.py"):
        build("cnn").save(file)
        rewritten(file, lambda name, content: content, **{member: b"x"})
        with pytest.raises(ModelError, match=r"does not belong in a \.keras file"):
            read_keras(file)
    sequence(keras.Input((6,)), L.Lambda(lambda x: x * 2), L.Dense(2)).save(file)
    with pytest.raises(ModelError, match=r"Lambda layer lambda.*code in files is never run"):
        read_keras(file)
    with pytest.raises(OutputError, match=r"ends in \.keras"):
        write_keras(load(build("cnn")), tmp_path / "model.h5")
    with pytest.raises(ModelError, match="HDF5 files are not read"):
        (tmp_path / "model.h5").write_bytes(b"x")
        load(tmp_path / "model.h5")


def test_unregistered_classes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.keras"
    build("operations").save(file)

    def other(name: str, content: bytes) -> bytes:
        if name != "config.json":
            return content
        text = json.dumps(json.loads(content)).replace("tests>Scaled", "tests>Missing")
        return text.replace('"class_name": "Scaled"', '"class_name": "Missing"').encode()

    rewritten(file, other)
    with pytest.raises(ModelError, match="Missing is not registered: decorate it with"):
        read_keras(file)


def test_open_sizes_are_invented_or_given() -> None:
    image = keras.Input((None, None, 3))
    x = L.GlobalAveragePooling2D()(L.Conv2D(8, 3, padding="same", strides=2)(image))
    model = stirred(keras.Model(image, L.Dense(2)(x)))
    network = load(model)
    assert [tuple(value.shape) for value in network.example.values()] == [(2, 64, 64, 3)]
    other = load(model, torch.randn(2, 10, 12, 3))
    smaller = half(other).apply(other).module
    assert isinstance(smaller, KerasModule) and smaller.model.input_shape == (None, None, None, 3)
