"""A smaller network on disk: weights as safetensors, the plan as JSON; no class is pickled."""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tinier.edits.base import Plan
from tinier.edits.config import standard
from tinier.edits.mask import unmask
from tinier.edits.quantize import Quantize, QuantizeDynamically, QuantizeWeight
from tinier.errors import InputError, OutputError
from tinier.graph import archive
from tinier.modules.keras import KerasModule
from tinier.modules.masked import masks_of, plain_name
from tinier.network import Example, Network
from tinier.output import check_output, whole
from tinier.report.folder import COMPANIONS, PLAN, WEIGHTS, save_weights
from tinier.sources.keras import write_keras
from tinier.targets.onnxruntime import OnnxRuntime
from tinier.verbs.smaller import Smaller, network_of

PACKED = "model.tinier"
OURS = {PLAN, WEIGHTS, *COMPANIONS, "model.onnx", "model.pt2", "model.keras", "README.md", PACKED}
QUANTIZES = Quantize | QuantizeDynamically | QuantizeWeight
OURS |= {"quantization.json", "openvino_model.xml", "openvino_model.bin", "report.html"}


def save(smaller: Smaller | Network, folder: str | Path) -> None:
    """Write float weights (safetensors) and plan (JSON), from which ``load`` rebuilds the network. No class is pickled.

    A model of transformers that its config alone describes comes with its config and tokenizer: ``from_pretrained`` loads the folder
    without tinier.

    Args:
        smaller: what another step gave, or a network.
        folder: to make; or a file that needs no class: ``….pt2``, the traced graph with its weights, or ``….keras`` for Keras models.

    Raises:
        OutputError: the folder exists and was not made by tinier, or cannot be written.
        InputError: a ``.keras`` file of what is no Keras model; or something else than a step gives.
        RefusedError: the weights are on the meta device.
    """
    if isinstance(smaller, Network):
        smaller = Smaller(smaller, smaller, Plan())
    if not isinstance(smaller, Smaller):
        raise InputError(
            f"save: a {type(smaller).__name__}; give what prune, shrink or another step gave, which has the plan; "
            "a module alone is saved by torch.save(model.state_dict(), …)"
        )
    network = smaller.trainable or smaller.network
    network.need_values("save")
    if str(folder).endswith((".pt2", ".keras")):
        file = Path(folder)
        if not file.absolute().parent.is_dir():
            raise OutputError(f"{file}: the folder {file.parent} does not exist; make it first")
        if file.suffix == ".keras":
            write_keras(network, file)
        else:
            archive.write(network.traced, network.example, file)
        return
    path = check_output(folder, lambda found: {p.name for p in found.iterdir()} <= OURS)
    with whole(path) as made:
        write_parts(smaller, made)


def write_parts(smaller: Smaller, folder: Path) -> None:
    """The files of ``save`` into an existing folder."""
    network = smaller.trainable or smaller.network
    save_weights(network, folder / WEIGHTS)
    (folder / PLAN).write_text(smaller.plan.to_json())
    if standard(network.module, network.example):
        config: Any = copy.deepcopy(network.module.config)
        config.architectures = [type(network.module).__name__]
        config.save_pretrained(folder)
        source = network.folder or smaller.original.folder
        for name in COMPANIONS if source else ():
            if name != "config.json" and (source / name).is_file():  # type: ignore[operator]
                shutil.copyfile(source / name, folder / name)  # type: ignore[operator]


def write_all(smaller: Smaller, folder: str | Path) -> None:
    """Write what a user of the command line takes away: what ``save`` writes, the model as ONNX and how to run it.

    Raises:
        OutputError: the folder exists and was not made by tinier, or cannot be written.
    """
    path = check_output(folder, lambda found: {p.name for p in found.iterdir()} <= OURS)
    with whole(path) as made:
        write_parts(smaller, made)
        network = smaller.network
        target = OnnxRuntime()
        refusal = target.refuses(network)
        if isinstance(network.module, KerasModule):
            write_keras(network, made / "model.keras")
        else:
            archive.write(network.traced, network.example, made / "model.pt2")
        if refusal is None:
            artifact = target.lower(network, made)
            usage = f"```python\n{target.usage(artifact, network)}\n```"
        else:
            usage = f"There is no ONNX file: {refusal}."
        (made / "README.md").write_text(_readme(smaller, usage), encoding="utf-8")


def _readme(smaller: Smaller, usage: str) -> str:
    return f"""# {smaller.original.name}, made smaller by tinier

```text
{smaller}
```

{usage}

`model.keras`, where there is one, is for Keras on any backend.
`model.pt2`, where there is one, is the network for torch without its class: `tinier.load("model.pt2").model` can be trained on.
`plan.json` and `model.safetensors` are what `tinier.load(folder, into=model)` rebuilds the network from, to train on.
"""


def load(
    folder: str | Path,
    into: Any = None,
    example: Example | None = None,
    *,
    quantized: bool = False,
) -> Smaller:
    """Rebuild the smaller float network from a folder that ``save`` or ``compress`` wrote, or the quantized one.

    After quantization-aware training the float network has the trained weights.

    Args:
        folder: has ``plan.json`` and ``model.safetensors``; or a ``.pt2`` or ``.keras`` file, which need no class.
        into: the original model: an ``nn.Module`` of the same class and sizes, or the path that it came from.
        example: example inputs.
        quantized: whether ``network`` is the quantized network, and the float one its ``trainable``.

    Raises:
        InputError: the folder has no plan, or it does not fit the model; or there is nothing quantized in it.
    """
    folder = Path(folder)
    if folder.suffix in (".pt2", ".keras") and into is None:
        network = network_of(folder, example)
        return Smaller(network, network, Plan())
    if into is None:
        raise InputError(
            f"{folder}: the original model is needed: load(folder, into=model); a .pt2 file needs none"
        )
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; name a folder that save or compress wrote")
    network = network_of(into, example)
    try:
        plan = Plan.from_json((folder / PLAN).read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / PLAN} cannot be read: {error}") from error
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read: {error}") from error
    # Ranges belong to the artifact: the weights on disk are float and trainable.
    done = Plan(tuple(edit for edit in plan.edits if not edit.of_artifact))
    smaller = done.apply(network)
    if any(edit.of_artifact for edit in plan.edits) and not _fits(weights, smaller):
        # Trained weights for which the class has no place: those of the folded graph.
        done = Plan(tuple(edit for edit in plan.edits if not isinstance(edit, QUANTIZES)))
        smaller = done.apply(network)
    try:
        if masks_of(smaller.module) and not any("parametrizations" in name for name in weights):
            smaller = unmask(smaller)  # a later step made the zeros permanent
        state = (
            smaller.module.state_dict()
        )  # versions of layers are in it, and none in a file of safetensors
        state.update(weights)
        for name in state.keys() - weights.keys():
            del state[name]
        smaller.module.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{folder / WEIGHTS} does not fit the model: {error}") from error
    if not quantized:
        return Smaller(smaller, network, done)
    applied = {id(edit) for edit in done.edits}
    rest = Plan(tuple(edit for edit in plan.edits if id(edit) not in applied))
    if not rest.edits:
        raise InputError(f"{folder} has no quantized network; leave quantized=True out")
    return Smaller(rest.apply(smaller), network, plan, smaller)


def _fits(weights: Mapping[str, Tensor], network: Network) -> bool:
    """Whether weights are those of a network, by their names, held at zero or not; of tied ones one is enough."""
    state = network.module.state_dict()
    own = {plain_name(name): tensor for name, tensor in state.items() if "0.mask" not in name}
    given = {plain_name(name) for name in weights if "0.mask" not in name}
    if not given <= own.keys():
        return False
    there = {own[name].data_ptr() for name in given}
    return all(own[name].data_ptr() in there for name in own.keys() - given)
