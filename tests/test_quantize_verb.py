"""tinier.quantize, tinier.deliver and tinier quantize: what they give, refuse and write."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import tinier
from tinier.cli import app
from tinier.edits.quantize import Quantize, QuantizeWeight
from tinier.errors import DataError, InputError, ParityError, RefusedError
from tinier.measure.parity import parity
from tinier.network import Network
from tinier.targets.base import Artifact, targets_for
from tinier.targets.onnxruntime import OnnxRuntime
from tinier.verbs.delivery import RECORD

RUN = CliRunner()


class Tied(nn.Module):
    """An embedding whose table is the weight of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.body(self.table(ids))))
        return found


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 24, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(x)[0][:, -1])
        return found


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    ).eval()


IMAGES = torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def error(found: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((found(x) - model(x)).norm() / model(x).norm())


def test_the_model_stays_and_more_bits_lose_less() -> None:
    model = cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    errors = []
    for bits in (3, 4, 6, 8):
        found = tinier.quantize(model, IMAGES[:2], IMAGES, bits=bits)
        errors.append(error(found.model, model, IMAGES))
        assert found.trainable is not None and found.trainable.module is model
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_alone_take_values_of_their_grid(bits: int) -> None:
    model = cnn()
    found = tinier.quantize(model, IMAGES[:2], activations=None, bits=bits)
    edits = [edit for edit in found.plan.edits if isinstance(edit, QuantizeWeight)]
    assert len(edits) == 3 and not any(isinstance(e, Quantize) for e in found.plan.edits)
    for name, value in found.network.module.state_dict().items():
        if name.endswith("_integers"):
            assert len(value.flatten(1)[0].unique()) <= 2**bits
            assert int(value.max()) - int(value.min()) < 2**bits
    limit = {2: 1.0, 3: 0.3, 4: 0.15, 5: 0.1, 6: 0.04, 8: 0.01}[bits]
    assert error(found.model, model, IMAGES) < limit


def test_groups_layers_and_exclusions() -> None:
    model = cnn()
    found = tinier.quantize(
        model, IMAGES[:2], activations=None, bits=4, group=8, layers={"7": 8}, exclude=["0"]
    )
    edits = {e.tensor: e for e in found.plan.edits if isinstance(e, QuantizeWeight)}
    assert sorted(edits) == ["5.weight", "7.weight"]
    assert edits["5.weight"].scale.tensor.shape == (16, 1)
    assert edits["7.weight"].scale.tensor.shape == (5, 2) and edits["7.weight"].high == 127
    assert edits["5.weight"].high == 15, "below 8 bits zero points are free"
    with pytest.raises(InputError, match=r"5\.weight: group size 3 does not divide 8 inputs; use"):
        tinier.quantize(model, IMAGES[:2], activations=None, group=3)
    with pytest.raises(InputError, match="nothing is called 8"):
        tinier.quantize(model, IMAGES[:2], activations=None, exclude=["8"])


def test_tied_and_recurrent_weights_are_stored_as_integers() -> None:
    torch.manual_seed(0)
    tied, ids = Tied().eval(), torch.arange(36).view(3, 12)
    found = tinier.quantize(tied, ids, activations=None)
    edits = [edit for edit in found.plan.edits if isinstance(edit, QuantizeWeight)]
    assert len(edits) == 2, "a tied tensor is stored once"
    assert error(found.model, tied, ids) < 0.02
    lstm, x = Recurrent().eval(), torch.randn(16, 7, 6)
    static = tinier.quantize(lstm, x[:2], x)
    stored = {e.tensor for e in static.plan.edits if isinstance(e, QuantizeWeight)}
    assert stored == {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"}
    assert error(static.model, lstm, x) < 0.05


def test_what_has_no_range_or_no_data() -> None:
    model = cnn()
    with torch.no_grad():
        dead = dict(model.named_parameters())
        dead["0.weight"][1].zero_()
        dead["5.weight"].zero_()
    zeros = tinier.quantize(model, IMAGES[:2], torch.zeros(8, 2, 8, 8))
    assert error(zeros.model, model, torch.zeros(4, 2, 8, 8)) < 0.05
    fine = tinier.quantize(model, IMAGES[:2], IMAGES, rounding="error_feedback")
    assert error(fine.model, model, IMAGES) < 0.05, "dead inputs make the Gram matrix singular"
    bad = IMAGES.clone()
    bad[3, 0, 0, 0] = float("inf")
    with pytest.raises(DataError, match="infinity"):
        tinier.quantize(model, IMAGES[:2], bad)
    with pytest.raises(InputError, match="needs data"):
        tinier.quantize(model, IMAGES[:2])
    with pytest.raises(InputError, match="needs data"):
        tinier.quantize(model, IMAGES[:2], activations=None, rounding="error_feedback")
    with torch.no_grad():
        dead["7.weight"][0, 0] = float("nan")
    with pytest.raises(RefusedError, match=r"7\.weight has NaN"):
        tinier.quantize(model, IMAGES[:2], activations=None)


def test_what_is_quantized_already_and_options_that_cannot_be() -> None:
    model = cnn()
    found = tinier.quantize(model, IMAGES[:2], IMAGES)
    with pytest.raises(RefusedError, match="quantized already"):
        tinier.quantize(found, data=IMAGES)
    for arguments, message in (
        ({"bits": 1}, "bits=1: 2 to 16"),
        ({"bits": 12, "activations": None}, "2 to 8 are possible for weights alone"),
        ({"activations": 1}, "activations=1"),
        ({"group": 8}, "group=8: integer operators"),
        ({"symmetric": False}, "symmetric=False: integer operators"),
        ({"ranges": "guess"}, "ranges='guess'"),
        ({"weight_ranges": "guess"}, "weight_ranges='guess'"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"layers": {"nothing": 4}}, "nothing is called nothing"),
    ):
        with pytest.raises(InputError, match=message):
            tinier.quantize(model, IMAGES[:2], IMAGES, **arguments)  # type: ignore[arg-type]


def test_after_pruning_and_back_to_training(tmp_path: Path) -> None:
    model = cnn()
    pruned = tinier.prune(model, IMAGES[:2], keep=0.6)
    found = tinier.quantize(pruned, data=IMAGES)
    assert found.original is pruned.original and found.trainable is pruned.network
    done = tinier.deliver(found, tmp_path / "out", data=IMAGES, attribution=True)
    assert done.attribution is not None and done.attribution.layers
    assert done.artifacts["onnxruntime"].files == (tmp_path / "out" / "model.onnx",)
    again = tinier.load(tmp_path / "out", into=model, example=IMAGES[:2])
    assert torch.equal(again.model(IMAGES), pruned.model(IMAGES)), "the float network comes back"
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (
        record["artifacts"]["onnxruntime"]["bytes"] == (tmp_path / "out/model.onnx").stat().st_size
    )
    assert set(record["weights"].values()) == {8}


def test_nothing_is_written_where_the_runtime_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tinier.quantize(cnn(), IMAGES[:2], IMAGES)
    other = tinier.quantize(cnn(), IMAGES[:2], IMAGES, bits=3)
    honest = OnnxRuntime.lower

    def wrong(self: OnnxRuntime, network: Network, folder: Path) -> Artifact:
        return honest(self, other.network, folder)

    monkeypatch.setattr(OnnxRuntime, "lower", wrong)
    with pytest.raises(ParityError, match="onnxruntime computes something else"):
        tinier.deliver(found, tmp_path / "out", data=IMAGES)
    assert not (tmp_path / "out").exists()
    float_network = tinier.prune(cnn(), IMAGES[:2], keep=0.6)
    with pytest.raises(InputError, match="not quantized"):
        tinier.deliver(float_network, tmp_path / "out")


def test_the_command_line(tmp_path: Path) -> None:
    found = tinier.prune(cnn(), IMAGES[:2], keep=0.999)
    tinier.save(found, tmp_path / "model.pt2")
    np.savez(tmp_path / "data.npz", input=IMAGES.numpy())
    arguments = ["quantize", str(tmp_path / "model.pt2"), "-o", str(tmp_path / "out")]
    missing = RUN.invoke(app, arguments)
    assert missing.exit_code == 2 and "needs data" in missing.output
    arguments += ["--data", str(tmp_path / "data.npz")]
    done = RUN.invoke(app, [*arguments, "--json", "--attribution", "--layer", "7*=4"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert sorted(facts["weights"].values()) == [4, 8, 8]
    assert facts["attribution"]["layers"][0]["restored"] > 0
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    assert "QuantizeLinear" in operators
    shown = RUN.invoke(app, [*arguments, "--attribution"])
    assert shown.exit_code == 0 and "smaller" in shown.stdout and "gives back" in shown.stdout
    wrong = RUN.invoke(app, [*arguments, "--layer", "fc"])
    assert wrong.exit_code == 2 and "layer4.*=4" in wrong.output


class FixedBatch(nn.Module):
    """A network whose batch size is fixed at 40."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x))).reshape(40, 4) * torch.ones(40, 1)


def test_batches_stay_whole_where_their_size_is_fixed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = FixedBatch().eval(), torch.randn(200, 16)
    found = tinier.quantize(model, x[:40], x)
    assert error(found.model, model, x[:40]) < 0.05
    assert tinier.quantize(model, x[:40], x, activations=None, bits=4, restore=0.5).notes
    done = tinier.deliver(found, tmp_path / "out", data=x, attribution=True)
    assert done.attribution is not None and done.attribution.examples == 40


def test_all_weights_count_for_the_size_that_was_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    x = torch.randn(64, 16)
    fixed = tinier.quantize(model, x[:2], x, activations=None, max_size=3000, layers={"2": 8})
    bits = {e.tensor: (e.high - e.low).bit_length() for e in fixed.plan.edits if isinstance(e, QuantizeWeight)}  # fmt: skip
    assert bits["2.weight"] == 8
    scales = 4 * sum(
        e.scale.tensor.numel() for e in fixed.plan.edits if isinstance(e, QuantizeWeight)
    )
    sizes = dict(model.named_parameters())
    assert sum(sizes[name].numel() * b / 8 for name, b in bits.items()) + scales <= 3000
    with pytest.raises(RefusedError, match="those that stay float take 8"):
        tinier.quantize(model, x[:2], x, activations=None, max_size=1800, exclude=["2"])
    with pytest.raises(RefusedError, match="nothing needs to be quantized"):
        tinier.quantize(model, x[:2], x, activations=None, max_size="1MB", choices=(0, 8))
    for arguments, message in (
        ({"max_size": 3000, "restore": 0.5}, "leave one out"),
        ({"choices": (0,), "max_size": 3000}, "at least one number of bits"),
        ({"activations": "dynamic", "rounding": "learned"}, "no gradient"),
        ({"restore": "0.5"}, "share of the loss"),
    ):
        with pytest.raises(InputError, match=message):
            tinier.quantize(model, x[:2], x, **({"activations": None} | arguments))  # type: ignore[arg-type]
    dynamic = tinier.quantize(model, x[:2], x, activations="dynamic", bits=4)
    with pytest.raises(InputError, match="no gradient"):
        tinier.recover(dynamic, x, epochs=1)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"output": y, "aux": y.relu()}


def test_outputs_keep_their_names() -> None:
    x = torch.randn(8, 4)
    found = tinier.quantize(Named().eval(), x[:2], x)
    result = found.network.module(x)
    assert isinstance(result, dict) and list(result) == ["output", "aux"]
    assert found.network.traced.outputs == ("output", "aux")


@pytest.mark.parametrize("groups", [1, 2])
def test_error_feedback_of_convolutions_beats_nearest(groups: int) -> None:
    """Inputs that belong together, as pixels of pictures do, let the weights of a kernel take up each other's rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 12, 3, groups=groups, bias=False)).eval()
    smooth = nn.functional.avg_pool2d(torch.randn(48, 4, 16, 16), 5, 1, 2)
    x, unseen = smooth[:32] * torch.tensor([1.0, 3.0, 0.3, 1.0])[:, None, None], smooth[32:]
    for bits in (3, 4):
        lost = {}
        for rounding in ("nearest", "error_feedback"):
            found = tinier.quantize(
                model, x[:2], x, activations=None, bits=bits, rounding=rounding, symmetric=True
            )
            lost[rounding] = error(found.model, model, x)
            assert error(found.model, model, unseen) < 0.3
        assert lost["error_feedback"] < 0.75 * lost["nearest"]


class Words(nn.Module):
    """Token ids of any length, attention between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(30, 16), nn.Linear(16, 96)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = torch.relu(self.body(self.table(ids))).unsqueeze(1).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        found: Tensor = self.head(mixed)
        return found


@pytest.mark.parametrize("activations", [8, "dynamic", None])
def test_sequences_stay_of_any_length(activations: int | str | None, tmp_path: Path) -> None:
    ids = torch.randint(0, 30, (32, 9), generator=torch.Generator().manual_seed(0))
    model = Words().eval()
    found = tinier.quantize(model, ids[:2], ids, activations=activations)
    sessions = [
        target.open(tinier.export(found, tmp_path, target=target.name).files[0], 1)
        for target in targets_for(("onnxruntime", "openvino"))
    ]
    for length in (5, 9, 14):
        batch = torch.randint(0, 30, (3, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert error(found.model, model, batch) < 0.1
        for session in sessions:
            compared = parity(found.network, session, [{"ids": batch}])
            assert compared.passed, compared.reason
