"""Files of a higher opset than they were written with: operators that changed since, and what stays low."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tinier
from tinier.targets.base import targets_for
from tinier.targets.onnx_file import OPSET, to_onnx
from tinier.targets.onnx_opset import BLOCKS


class Sampled(nn.Module):
    """A convolution whose values are looked up between pixels, and a linear layer."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, 64)
        self.grid: Tensor
        self.register_buffer("grid", torch.rand(1, 5, 5, 2) * 1.8 - 0.9)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.grid.expand(x.shape[0], -1, -1, -1)
        there = F.grid_sample(self.conv(x), grid, mode=self.mode, align_corners=False)
        found: Tensor = self.head(there.mean((2, 3)))
        return found


class Spectrum(nn.Module):
    """A linear layer, the absolute values of a Fourier transform, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 32), nn.Linear(17, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.fft.rfft(self.first(x)).abs())
        return found


def opset(model: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if not entry.domain)


@pytest.mark.parametrize("activations", [None, 8])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic", "spectrum"])
def test_four_bits_beside_operators_that_changed(
    kind: str, activations: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    spectrum = kind == "spectrum"
    model = (Spectrum() if spectrum else Sampled(kind)).eval()
    x = torch.randn(12, 32) if spectrum else torch.randn(12, 3, 8, 8)
    data = None if activations is None else x
    arguments: dict[str, Any] = {"activations": activations, "corrections": ()}
    found = tinier.quantize(model, x[:2], data, bits=4, **arguments)
    written = to_onnx(found.network)
    assert opset(written) == BLOCKS
    onnx.checker.check_model(written, full_check=True)
    wanted = found.network({"x": x})[0].numpy()
    before = model(x).detach().numpy()
    scale = np.abs(wanted - before).max()  # what rounding changes
    ran = 0
    for target in targets_for(("onnxruntime", "openvino")):
        if target.name == "openvino" and spectrum:
            continue  # takes no such transform of floats either
        artifact = target.lower(found.network, tmp_path)
        (result,) = target.open(artifact.files[0], 1).run({"x": x.numpy()})
        assert np.abs(result - wanted).max() < 0.1 * scale
        ran += 1
    assert ran


def test_bytes_stay_where_more_runtimes_read_them() -> None:
    model, x = Sampled("bilinear").eval(), torch.randn(4, 3, 8, 8)
    assert opset(to_onnx(tinier.quantize(model, x[:2], x).network)) == OPSET
