"""Pack and unpack: weights, or an ONNX file, in one file for storage and transport that gives back the same bits."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinier.data.python import FUNCTION, call_function
from tinier.errors import InputError, RefusedError
from tinier.modules.keras import KerasModule
from tinier.modules.masked import masks_of, plain_name, release
from tinier.output import whole_file
from tinier.report.packed_file import Packed, PackedFile, write
from tinier.units import parse_bytes
from tinier.verbs.onnx_bytes import GRAPH, put_together, taken_apart
from tinier.verbs.smaller import network_of

WEIGHTS, ONNX = "weights", "onnx"


def pack(model: Any, file: str | Path) -> Packed:
    """Write weights, or an ONNX file, as one file of as few bytes as give back the same bits.

    Tensors of at most 256 different values become a codebook and labels, integers take the bits that they use, floats are split in planes
    of bytes, and all of it is entropy-coded by the best of several codes for each tensor. Nothing is rounded: weights become few values by
    ``WeightSharing``, zeros by ``prune(pattern=…)``, integers by ``quantize``.

    Args:
        model: what a step gave, a network, an ``nn.Module``; or the path of an ``.onnx`` or ``.safetensors`` file, or of another model.
            Weights that are held at zero are stored as zeros under their plain names. Never changed.
        file: to write, such as "model.tinier"; replaced if it exists.

    Returns:
        Bytes by kind of tensor; printing it shows them.

    Raises:
        InputError: the model cannot be read, or has tensors of a type that cannot be packed.
        RefusedError: a state is no tensor, or has no values.
        OutputError: the file cannot be written.

    Cost:
        About half a second for each MB in memory; seven times the largest tensor beside the weights.

    Source:
        Han et al. 2016, "Deep Compression", sections 3 and 4.
    """
    file = Path(file)
    if isinstance(model, str | Path) and Path(model).suffix == ".onnx":
        return _pack_onnx(Path(model), file)
    return write(_state(model).items(), {"kind": WEIGHTS}, file)


def unpack(
    file: str | Path, into: Any = None, *, at_most: float | str | None = None
) -> nn.Module | dict[str, Tensor] | Path:
    """What ``pack`` wrote, with the same bits.

    Args:
        file: from ``pack``, perhaps by somebody else: it is checked, and nothing in it is run.
        into: for weights: a model, or what a step gave, of the same structure, which is never changed; the path of a
            ``.safetensors`` file to write; or None. For a packed ONNX file: the path of the ``.onnx`` file to write.
        at_most: bytes, or a text such as "4GB", that it may take unpacked; None for 256 times the file and 256 MiB.

    Returns:
        A copy of the model with the weights; the path that was written; or name → tensor.

    Raises:
        InputError: the file is damaged, takes more memory than allowed, or does not fit the model; the message says where.
        OutputError: the path cannot be written.

    Cost:
        Some milliseconds for each MB unpacked; a few times the weights.
    """
    limit = None if at_most is None else parse_bytes(at_most, "at_most")
    packed = PackedFile(Path(file), limit)
    kind = packed.facts.get("kind")
    path = Path(into) if isinstance(into, str | Path) else None
    if kind == ONNX:
        if path is None or path.suffix != ".onnx":
            raise InputError(
                f"{file} is a packed ONNX file; name the file to write: into='model.onnx'"
            )
        with whole_file(path) as made:
            made.write_bytes(put_together(packed))
        return path
    if kind != WEIGHTS:
        raise InputError(f"{file}: a packed {str(kind)[:40]!r}; weights and onnx are known")
    if into is None:
        return packed.load()
    if path is not None and path.suffix == ".safetensors":
        with whole_file(path) as made:
            # Memory that tensors share is refused there.
            save_file({n: t.clone() for n, t in packed.load().items()}, made, {"format": "pt"})
            made.chmod(0o644)  # safetensors makes files that only their owner may read
        return path
    return _filled(packed, _module(into))


def _pack_onnx(path: Path, file: Path) -> Packed:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    parts, facts = taken_apart(data, str(path))
    return write(parts, {"kind": ONNX, **facts}, file, rest=GRAPH)


def _module(model: Any) -> nn.Module:
    """The module of whatever was given; it need not be run, so that no example inputs are asked for."""
    if isinstance(model, str) and FUNCTION.fullmatch(model) and not Path(model).exists():
        made = call_function(model)
        model = made[0] if isinstance(made, tuple) and made else made
    return model if isinstance(model, nn.Module) else network_of(model).module


def _state(model: Any) -> Mapping[str, Tensor]:
    """Name → tensor of whatever is to be packed, held zeros as plain ones."""
    if isinstance(model, str | Path) and Path(model).suffix == ".safetensors":
        try:
            return load_file(model)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{model}: not a safetensors file: {error}") from error
    module = _module(model)
    if masks_of(module):
        module = copy.deepcopy(module)
        release(module)
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise RefusedError(
                f"{name}: a state that is a {type(value).__name__}, not a tensor; it cannot be packed without pickle"
            )
        if value.is_meta:
            raise RefusedError(
                f"{name} is on the meta device and has no values to pack; load the weights first"
            )
    return state


def _filled(packed: PackedFile, module: nn.Module) -> nn.Module:
    """A copy of a module with packed weights; that they fit is known before any is unpacked."""
    result = copy.deepcopy(module)
    state = result.state_dict()
    held = masks_of(result)
    masks = {name for name in state if plain_name(name) in held and name.endswith(".0.mask")}
    keys = {plain_name(name): name for name in state if name not in masks}
    names = {one.name for one in packed.tensors}
    for wrong, what in ((keys.keys() - names, "no"), (names - keys.keys(), "what the model has not:")):  # fmt: skip
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise InputError(
                f"{packed.file} has {what} {min(wrong)}{more}; unpack it into a model of the same class and sizes"
            )
    for one in packed.tensors:
        old, dtype = state[keys[one.name]], packed.dtype(one)
        if tuple(old.shape) != one.shape or old.dtype != dtype:
            raise InputError(
                f"{packed.file}: {one.name} is {dtype} {one.shape}, the model's {old.dtype} {tuple(old.shape)}; "
                "unpack it into a model of the same class and sizes"
            )
    loaded = packed.load()
    for name, mask in held.items():
        if bool((loaded[name].to(mask.device)[~mask] != 0).any()):
            raise InputError(
                f"{packed.file}: {name} has other zeros than the model holds; unpack it into the model without masks"
            )
    state.update({keys[name]: tensor for name, tensor in loaded.items()})
    result.load_state_dict(state)
    return result.model if isinstance(result, KerasModule) else result
