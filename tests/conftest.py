"""Runs of the main job that several files of tests look at."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from tinier.compress import compress
from tinier.network import Network
from tinier.search.candidate import Result
from tinier.targets.onnx_file import write_onnx
from toy import Recorder, TinyCNN, TinyMLP, images, steady, trained

torch.set_num_threads(1)


class Run(NamedTuple):
    """A finished run: what went in, what came out, what was said on the way."""

    model: nn.Module
    data: Path
    folder: Path
    result: Result
    progress: Recorder


@pytest.fixture(scope="session")
def cnn() -> nn.Module:
    return trained(TinyCNN)


@pytest.fixture(scope="session")
def mlp() -> nn.Module:
    return trained(TinyMLP)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, mlp: nn.Module) -> Path:
    """A folder with model.onnx, valid.npz (700 labelled examples), train.npz and unlabelled.npz."""
    folder = tmp_path_factory.mktemp("files")
    for name, count, seed in (("valid", 700, 2), ("train", 300, 3)):
        x, y = images(count, seed)
        np.savez(folder / f"{name}.npz", x=x.numpy(), y=y.numpy())
    np.savez(folder / "unlabelled.npz", x=images(500, 4)[0].numpy())
    write_onnx(Network(mlp, {"x": images(2, 0)[0]}, "mlp"), folder / "model.onnx")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, cnn: nn.Module, files: Path) -> Run:
    """The CNN with training data: pruned to half, quantized, recovered; at most 4 points worse."""
    folder = tmp_path_factory.mktemp("run") / "out"
    progress = Recorder()
    with steady(keeps=(0.5,)):
        result = compress(
            cnn,
            str(files / "valid.npz"),
            example=images(2, 0)[0],
            train=str(files / "train.npz"),
            max_drop="4%",
            target="onnxruntime",
            budget=120,
            out=folder,
            threads=1,
            progress=progress,
        )
    return Run(cnn, files / "valid.npz", folder, result, progress)


@pytest.fixture(autouse=True)
def torch_stays_as_it_was() -> Iterator[None]:
    """No test, and nothing that it runs, may leave torch's own settings changed for those that follow."""
    assert torch.get_num_threads() == 1, "a file of tests changed the threads while it was read"
    yield
    assert torch.is_grad_enabled(), "gradients were left switched off"
    assert torch.get_num_threads() == 1, "the number of threads was left changed"
