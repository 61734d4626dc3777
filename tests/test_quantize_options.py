"""Options of tinier.quantize: one scale a tensor, zero points of 0, norms estimated again."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from typer.testing import CliRunner

import tinier
from tinier.cli import app
from tinier.edits.assign import Assign, Fold
from tinier.edits.base import Plan
from tinier.edits.quantize import Quantize, QuantizeWeight
from tinier.errors import InputError
from tinier.methods.batch_norm_reestimation import normed, reestimate_folded_norms
from tinier.methods.norm_statistics import reestimate_norms
from tinier.methods.quantization import Quantization
from tinier.network import Network
from tinier.search.bit_allocation import packed_bytes
from tinier.targets.onnx_file import to_onnx

IMAGES = torch.randn(48, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def cnn() -> nn.Sequential:
    """Two convolutions with batch norms, ReLU and ReLU6 behind them, and two linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
            norm.bias.normal_()  # type: ignore[operator, union-attr]
    return model.eval()


def error(found: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((found(x) - model(x)).norm() / model(x).norm())


def weights_of(plan: Plan) -> dict[str, QuantizeWeight]:
    return {e.tensor: e for e in plan.edits if isinstance(e, QuantizeWeight)}


# One scale a tensor


def test_one_scale_a_tensor_is_the_largest_weight_over_the_largest_integer(tmp_path: Path) -> None:
    model = cnn()
    with torch.no_grad():
        model.get_parameter("8.weight").mul_(torch.logspace(-2, 0, 16)[:, None])
    found = tinier.quantize(
        model, IMAGES[:2], IMAGES, per_tensor=True, weight_ranges="minmax", corrections=()
    )
    edits = weights_of(found.plan)
    for name in ("8.weight", "10.weight"):
        wanted = float(model.get_parameter(name).detach().abs().max() / 127)
        assert edits[name].scale.tensor.shape == (1, 1)
        # On CPUs whose sums saturate the scale may have grown; it is nowhere more than twice as large.
        assert wanted * (1 - 1e-6) <= float(edits[name].scale.tensor) <= 2 * wanted
    whole = tinier.quantize(model, IMAGES[:2], IMAGES, weight_ranges="minmax", corrections=())
    assert error(whole.model, model, IMAGES) < 0.9 * error(found.model, model, IMAGES) < 0.05
    done = tinier.deliver(found, tmp_path / "out", data=IMAGES)
    assert all(row.passed for parity in done.parity.values() for row in parity.rows)


def test_the_file_has_numbers_where_all_channels_have_one_scale() -> None:
    def scales(per_tensor: bool) -> list[int]:
        found = tinier.quantize(
            cnn(), IMAGES[:2], IMAGES, per_tensor=per_tensor, weight_ranges="minmax"
        )
        graph = to_onnx(found.network).graph
        constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        return [
            constants[node.input[1]].size
            for node in graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in constants
        ]

    assert set(scales(True)) == {1}
    assert max(scales(False)) == 16


def test_bytes_of_one_scale_a_tensor() -> None:
    network = Network(cnn(), {"input": IMAGES[:2]})
    each, all_of_it = (
        packed_bytes(network, Quantization(activations=None, per_tensor=one), (8,))["8.weight"][8]
        for one in (False, True)
    )
    assert (each, all_of_it) == (8 * 16 + 16 * 4, 8 * 16 + 4)
    with pytest.raises(InputError, match="per_tensor=True: one scale a tensor, and group=8"):
        Quantization(activations=None, per_tensor=True, group=8)


# Zero points of 0


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_without_zero_points(bits: int) -> None:
    found = tinier.quantize(
        cnn(),
        IMAGES[:2],
        IMAGES,
        activations=bits,
        symmetric_activations=True,
        ranges="minmax",
        corrections=(),
    )
    edits = {e.tensor: e for e in found.plan.edits if isinstance(e, Quantize)}
    assert {e.zero_point for e in edits.values()} == {0}
    assert {(e.low, e.high) for e in edits.values()} == {(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)}
    first = next(edit for name, edit in edits.items() if name.startswith("input"))
    assert first.scale == pytest.approx(float(IMAGES.abs().max()) / (2 ** (bits - 1) - 1))


def test_integer_operators_before_a_clamp_stay_integer(tmp_path: Path) -> None:
    """A quantization with a zero point of 0 does not clamp at 0: the layer's own values are rounded, too, by the same scale."""
    model = cnn()
    found = tinier.quantize(model, IMAGES[:2], IMAGES, symmetric_activations=True)
    edits = {e.tensor: e for e in found.plan.edits if isinstance(e, Quantize)}
    for layer, clamp in (("conv2d", "relu"), ("linear", "relu_1")):
        assert edits[layer].scale == edits[clamp].scale
    assert error(found.model, model, IMAGES) < 0.05
    done = tinier.deliver(found, tmp_path / "out", data=IMAGES, target="cpu")
    assert all(row.passed for parity in done.parity.values() for row in parity.rows)
    again = tinier.recover(found, IMAGES, epochs=1)
    trained = [e for e in again.plan.edits if isinstance(e, Quantize)]
    assert {e.zero_point for e in trained} == {0}


def test_symmetric_activations_go_with_ranges_that_are_known_before() -> None:
    for activations in (None, "dynamic"):
        with pytest.raises(InputError, match="symmetric_activations=True: activations stay float"):
            tinier.quantize(
                cnn(), IMAGES[:2], activations=activations, symmetric_activations=True
            )  # fmt: skip


# Norms estimated again


def test_the_statistics_of_folded_norms_are_those_of_norms_behind_the_quantized_layers() -> None:
    """Against ``reestimate_norms`` on the network with its norms, whose weights are those that the integers stand for."""
    model = cnn()
    network = reestimate_norms(
        Network(model, {"input": IMAGES[:2]}), [{"input": IMAGES}]
    )  # its statistics are those of these examples
    model = network.module  # type: ignore[assignment]
    names = normed(network)
    assert names == ("0.weight", "3.weight")
    folded = Plan((Fold(),)).apply(network)
    method = Quantization(bits=3, activations=None, exclude=("8", "10"))
    plan = method.plan(folded)
    result, notes = reestimate_folded_norms(folded, plan, [{"input": IMAGES}], names)
    assert not notes and sum(isinstance(e, Assign) for e in result.edits) == 2
    other = network.copy()
    for name, norm in (("0.weight", model[1]), ("3.weight", model[4])):
        edit = weights_of(plan)[name]
        rounded = edit.grid.dequantize(edit.matrix(folded.module.get_parameter(name)))
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
        factor = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        weight = other.module.get_parameter(name)
        with torch.no_grad():
            weight.copy_(rounded.reshape(weight.shape) / factor.reshape(-1, 1, 1, 1))
    expected = reestimate_norms(other, [{"input": IMAGES}]).module(IMAGES).detach()
    found = result.apply(folded).module(IMAGES)
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))
    before = plan.apply(folded).module(IMAGES)
    assert (before - expected).abs().max() > 50 * (found - expected).abs().max()


def test_the_integers_stay_and_the_error_falls() -> None:
    wide = torch.randn(256, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    model = reestimate_norms(Network(cnn(), {"input": IMAGES[:2]}), [{"input": wide}]).module
    plain, done = (
        tinier.quantize(model, IMAGES[:2], wide, bits=2, activations=None, corrections=c)
        for c in ((), ("batch_norm_reestimation",))
    )
    assert error(done.model, model, IMAGES) < 0.9 * error(plain.model, model, IMAGES)
    before, after = plain.network.module.state_dict(), done.network.module.state_dict()
    integers = [name for name in before if name.endswith("_integers")]
    assert integers and all(torch.equal(before[n], after[n]) for n in integers)
    assert torch.equal(
        Plan.from_json(done.plan.to_json()).apply(done.original).module(IMAGES), done.model(IMAGES)
    )


def test_bias_correction_behind_it_aims_at_the_float_network() -> None:
    model = cnn()
    wide = torch.randn(256, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    one, both = (
        tinier.quantize(model, IMAGES[:2], wide, bits=3, corrections=c)
        for c in (
            ("batch_norm_reestimation",),
            ("batch_norm_reestimation", "bias_correction"),
        )
    )
    assert error(both.model, model, IMAGES) < error(one.model, model, IMAGES)


def test_without_norms_there_is_nothing_to_estimate() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(32, 8)
    found = tinier.quantize(model, x[:2], x, bits=3, corrections="batch_norm_reestimation")
    assert any("no batch norm was folded" in note for note in found.notes)
    with pytest.raises(InputError, match="needs data"):
        tinier.quantize(model, x[:2], activations=None, corrections=["batch_norm_reestimation"])


def test_the_command_line_has_these_options(tmp_path: Path) -> None:
    tinier.save(tinier.prune(cnn(), IMAGES[:2], keep=0.999), tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", input=IMAGES.numpy())
    arguments = ["quantize", str(tmp_path / "model.pt2"), "-o", str(tmp_path / "out"), "--json"]
    arguments += ["--data", str(tmp_path / "data.npz"), "--per-tensor", "--symmetric-activations"]
    done = CliRunner().invoke(app, [*arguments, "--correction", "batch_norm_reestimation"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["weights"].values()) == {8}
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {int(constants[node.input[2]]) for node in pairs} == {0}
    assert {constants[node.input[2]].dtype for node in pairs} == {np.dtype(np.int8)}
