"""Keras 3: a ``.keras`` file, read in safe mode, or a model, on the torch backend."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from tinier.errors import ModelError, OutputError
from tinier.modules.keras import KerasModule
from tinier.modules.keras_parts import is_graph, is_keras_model, keras_on_torch, unbuilt_layers
from tinier.network import Inputs, Network, name_inputs
from tinier.sources.base import Source, first_line, present
from tinier.sources.module import free_batch

OPEN_SIZE = 64  # stands for a height, width or length that the model leaves open
VOCABULARY = (
    8  # invented integers are below this, or below the vocabulary of the smallest embedding
)
MEMBERS = ("metadata.json", "config.json", "model.weights.h5", "model.weights.json")

MOST_CONFIG = 2**26  # bytes that a config may have when it is unpacked


class KerasSource(Source):
    """A ``.keras`` file or a Keras model of the torch backend; inputs have the names of its input layers, channels where it has them."""

    name = "keras"

    def accepts(self, model: Any) -> bool:
        if isinstance(model, str | Path):
            return Path(model).suffix.lower() == ".keras"
        return is_keras_model(model)

    def load(self, model: Any, example: Inputs | None) -> Network:
        if isinstance(model, str | Path):
            path = Path(model)
            return keras_network(read_keras(path), example, path.stem)
        keras_on_torch(f"the model {model.name}")
        return keras_network(model, example, str(model.name))


def keras_network(model: Any, example: Inputs | None, name: str) -> Network:
    """The network of a Keras model on the torch backend.

    Args:
        model: built; it is not changed.
        example: a tensor, a tuple or a dict by input name; None to invent one from the input layers.
        name: what tables and files call it.

    Raises:
        ModelError: it is not built, has no example, does not run or cannot be traced.
    """
    unbuilt = [] if getattr(model, "_called", True) else unbuilt_layers(model)
    if not model.built or unbuilt:
        which = f" ({', '.join(unbuilt[:3])})" if unbuilt else ""
        raise ModelError(
            f"{name}: the model is not built, its layers{which} have no weights yet; call it once on data: model(x)"
        )
    module = KerasModule(model)
    inputs = invented(module) if example is None else name_inputs(module, example)
    missing = [wanted for wanted in module.inputs if wanted not in inputs]
    if missing:
        raise ModelError(f"{name}: the example lacks the inputs {', '.join(missing)}")
    return free_batch(module, {n: inputs[n].detach().cpu() for n in module.inputs}, name)


def invented(module: KerasModule) -> dict[str, Tensor]:
    """Example inputs from the shapes and dtypes that the input layers declare; batch 2, open sizes 64.

    Raises:
        ModelError: the model does not declare its inputs, as subclassed models do not.
    """
    model = module.model
    if not is_graph(model):
        raise ModelError(
            f"{model.name}: {type(model).__name__} does not say what it takes; give example={{'{module.inputs[0]}': tensor}}"
        )
    generator = torch.Generator().manual_seed(0)
    result = {}
    limit = min(
        [int(layer.input_dim) for layer in model._flatten_layers() if hasattr(layer, "embeddings")]
        or [VOCABULARY]
    )
    for name, declared in zip(module.inputs, model.inputs, strict=True):
        shape = [2, *(OPEN_SIZE if size is None else int(size) for size in declared.shape[1:])]
        dtype = getattr(torch, str(declared.dtype).removeprefix("u"))
        if dtype.is_floating_point:
            result[name] = torch.randn(shape, generator=generator).to(dtype)
            if any(hasattr(layer, "embeddings") for layer in _readers(model, declared)):
                result[name] = torch.randint(limit, shape, generator=generator).to(dtype)
        else:
            result[name] = torch.randint(limit, shape, generator=generator).to(dtype)
    return result


def _readers(model: Any, tensor: Any) -> Iterator[Any]:
    """The layers that read an input of the model."""
    layer = tensor._keras_history.operation
    for node in getattr(layer, "_outbound_nodes", ()):
        yield node.operation


def read_keras(path: Path) -> Any:
    """A Keras model from a ``.keras`` file, on the torch backend; nothing in the file is run.

    Args:
        path: the file.

    Raises:
        ModelError: not a ``.keras`` file, or one with paths that lead out of it, Lambda layers or objects that are not registered.
        MissingError: Keras is not installed.
    """
    present(path)
    check_keras(path)
    keras = keras_on_torch(f"reading {path}")
    unknown = next(_unknown(json.loads(_config(path)), keras), None)
    if unknown is not None:
        raise ModelError(f"{path}: {unknown}")
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    # Keras and the layers that it builds raise what they like about a file that does not fit.
    except Exception as error:
        raise ModelError(f"{path}: Keras cannot load the model: {first_line(error)}") from error


def check_keras(path: Path) -> None:
    """Refuse what is no ``.keras`` archive, and archives with members that do not belong there.

    Raises:
        ModelError: the message names the member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ModelError(
            f"{path}: not a .keras file, which is a zip archive ({first_line(error)}); save the model with "
            "model.save('model.keras')"
        ) from error
    for name in names:
        pure = PurePosixPath(name)
        inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in name
        sharded = pure.name.startswith("model.weights") and pure.suffix in (".h5", ".json")
        known = (
            name in MEMBERS or pure.parts[:1] == ("assets",) or (len(pure.parts) == 1 and sharded)
        )
        if not inside or not known:
            raise ModelError(
                f"{path}: the member {name} does not belong in a .keras file; it is not read"
            )
    if "config.json" not in names or len(set(names)) != len(names):
        raise ModelError(f"{path}: not a .keras file: it has no config.json, or one twice")


def _config(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo("config.json").file_size > MOST_CONFIG:
            raise ModelError(f"{path}: its config.json is larger than any real one; it is not read")
        return archive.read("config.json").decode("utf-8")


def _unknown(value: Any, keras: Any) -> Iterator[str]:
    """What a config asks for that safe mode does not build, one sentence each."""
    if isinstance(value, list):
        for item in value:
            yield from _unknown(item, keras)
    if not isinstance(value, dict):
        return
    kind = value.get("class_name")
    module, registered = value.get("module"), value.get("registered_name")
    if kind in ("Lambda", "__lambda__") and (module is None or str(module).startswith("keras")):
        name = (
            value.get("config", {}).get("name", "") if isinstance(value.get("config"), dict) else ""
        )
        yield (
            f"it has a Lambda layer {name}, which is Python code; code in files is never run. Replace it by a layer class or "
            "keras.ops in the model, or load it yourself where you trust it and give the model"
        )
    elif isinstance(kind, str) and "config" in value and isinstance(module, str | None):
        ours = module is not None and module.split(".")[0] in (
            "keras",
            "builtins",
            "numpy",
            "keras_hub",
        )
        custom = registered if isinstance(registered, str) else kind
        if not ours and keras.saving.get_registered_object(custom) is None and ">" in custom:
            yield (
                f"{kind} is not registered: decorate it with @keras.saving.register_keras_serializable() and import its module "
                "before; or load the model yourself with custom_objects and give the model"
            )
    for item in value.values():
        yield from _unknown(item, keras)


def write_keras(network: Network, path: str | Path) -> None:
    """Write a network whose module is a Keras model as a ``.keras`` file, which plain Keras loads on any backend.

    Args:
        network: of a Keras model, as ``tinier.prune`` gives it.
        path: ends in ``.keras``; it is overwritten.

    Raises:
        ModelError: the network is not a Keras model any more, such as a quantized or a traced graph; the message says why.
        OutputError: another ending, or the file cannot be written.
    """
    path = Path(path)
    if not isinstance(network.module, KerasModule):
        reasons = [note for note in network.notes if note.startswith("what is left is")]
        why = "; ".join(reasons) or "its module is a " + type(network.module).__name__
        raise ModelError(f"{network.name} is no Keras model: {why}; write it as ONNX instead")
    if path.suffix != ".keras":
        raise OutputError(f"{path}: the name of a Keras file ends in .keras")
    try:
        network.module.model.save(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {first_line(error)}") from error
