"""A network from whatever the user has."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tinier.sources
from tinier.data.first import first_inputs
from tinier.errors import ModelError
from tinier.network import Example, Network, as_tensors
from tinier.registry import implementations
from tinier.sources.base import Source, present

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
KERAS = (".h5", ".hdf5")


def load(model: Any, example: Example | None = None, *, name: str | None = None) -> Network:
    """The network of a module, a Keras model, an ONNX or Keras file or a Hugging Face directory.

    Args:
        model: an ``nn.Module``; a Keras model; a path to an ``.onnx`` or ``.keras`` file; a directory with config.json and
            ``*.safetensors``; a Network, which is returned as it is.
        example: a tensor, a tuple of positional inputs or a dict of inputs by name, dimension 0 the batch; NumPy arrays become tensors.
            Modules need it; files say themselves what they take, except for sizes that they leave open.
        name: what tables and files call it; None for the file's or the class's name.

    Returns:
        The network, whose module is never changed; its batch size is free (2 in the example) where the model allows it.

    Raises:
        ModelError: the model cannot be read, run or traced; the message has the fix.
        MissingError: this kind of model needs a package that is not installed.

    Cost:
        Reading the model, a few runs of it and one trace.
    """
    if isinstance(model, Network):
        return model if name is None else replace(model, name=name)
    for kind in implementations(tinier.sources, Source).values():  # type: ignore[type-abstract]
        source = kind()
        if source.accepts(model):
            network = source.load(model, as_tensors(example, _kind(model)))
            if name is None:
                return network
            network = network if name == network.name else _renamed(network, name)
            return network
    if isinstance(model, str | Path):
        raise ModelError(_refusal(Path(model)))
    raise ModelError(
        f"model: a {type(model).__name__} cannot be compressed; give an nn.Module, a Keras model, an .onnx "
        "file, a .keras file or a Hugging Face directory"
    )


def load_for(model: Any, example: Example | None, data: Any) -> Network:
    """``load``; where the model does not say itself what it takes and there is no example, it comes from the data."""
    if example is not None:
        return load(model, example)
    try:
        return load(model)
    except ModelError as error:
        if "example" not in str(error):
            raise
        first = first_inputs(data)
        if first is None:
            raise
        return load(model, first)


def _kind(model: Any) -> torch.dtype:
    """The type of floats that a model computes with, as far as it says so."""
    tensors = model.parameters() if isinstance(model, nn.Module) else ()
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _renamed(network: Network, name: str) -> Network:
    renamed = replace(network, name=name)
    # The trace is of the same module: it need not be made again.
    if "traced" in vars(network):
        vars(renamed)["traced"] = network.traced
    return renamed


def _refusal(path: Path) -> str:
    present(path)
    ending = path.suffix.lower()
    if ending in PICKLES:
        return (
            f"{path}: pickle checkpoints are never loaded, they can run code. Convert it once: "
            f"state = torch.load({path.name!r}, weights_only=True); "
            "safetensors.torch.save_file(state, 'model.safetensors'); then build your class in Python, "
            "load_state_dict(safetensors.torch.load_file('model.safetensors')) and give the module"
        )
    if ending == ".safetensors":
        return (
            f"{path}: it has weights but not the network; build your class in Python, "
            f"load_state_dict(safetensors.torch.load_file({path.name!r})) and give the module, or give the "
            "Hugging Face directory with its config.json"
        )
    if ending in KERAS:
        return (
            f"{path}: HDF5 files are not read; convert it once where you trust it: "
            f"keras.saving.load_model({path.name!r}, compile=False).save({path.stem + '.keras'!r})"
        )
    return f"{path}: not a model that can be read; give an .onnx file, a .keras file or a Hugging Face directory"
