"""The single steps of the main job, for those who want to take them one by one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tinier.criteria.base import Criterion
from tinier.criteria.magnitude import Magnitude
from tinier.data.base import Examples
from tinier.data.read import read
from tinier.edits.base import Plan
from tinier.edits.slice import Slice
from tinier.edits.slice import kept as kept_indices
from tinier.errors import InputError
from tinier.measure.machine import machine
from tinier.methods.channel_pruning import ChannelPruning
from tinier.methods.static_quantization import StaticQuantization
from tinier.network import Example, Network
from tinier.output import check_output, whole
from tinier.recovery.loop import recover as train_student
from tinier.report.folder import PLAN, WEIGHTS, save_weights
from tinier.sources.load import load as load_source
from tinier.sources.load import load_for
from tinier.statistics import collect
from tinier.targets.base import Artifact, targets_for

BATCH = 64


@dataclass(frozen=True)
class Smaller:
    """A network that a plan made smaller.

    Attributes:
        network: the new network with its example inputs.
        original: the network that the plan was made for.
        plan: the decision; printing it shows what was changed.
        trainable: the float network before quantization; None where ``network`` is float itself.
    """

    network: Network
    original: Network
    plan: Plan
    trainable: Network | None = None

    @property
    def model(self) -> nn.Module:
        """The smaller module, runnable and trainable."""
        return self.network.module

    @property
    def kept(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Parameter name → dimension → indices that were kept, of every parameter that was cut."""
        return kept_indices(self.plan)

    def __str__(self) -> str:
        return str(self.plan)


def prune(
    model: Any,
    example: Example | None = None,
    *,
    keep: float = 0.5,
    of: str = "macs",
    criterion: Criterion | None = None,
) -> Smaller:
    """Cut channels, neurons and heads until ``keep`` of the cost is left; the result equals its masked reference.

    Args:
        model: an ``nn.Module``, the path of an ONNX file or of a Hugging Face directory; never changed.
        example: example inputs: a tensor, a tuple or a dict.
        keep: share that is kept, in (0, 1].
        of: "macs" or "parameters".
        criterion: scores the channels; L2 magnitude if None.

    Raises:
        RefusedError: pinned layers make the share impossible; the message says the least possible one.
    """
    network = _network(model, example)
    method = ChannelPruning(keep=keep, of=of, criterion=criterion or Magnitude())
    plan = method.plan(network)
    return Smaller(plan.apply(network), network, plan)


def quantize(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    ranges: str = "mse",
    bits: int = 8,
) -> Smaller:
    """Quantize weights and activations after training, with ranges taken from data.

    Args:
        model: an ``nn.Module``, a path, or what ``prune`` or ``recover`` gave.
        example: example inputs; None where the model brings its own.
        data: a few hundred examples of real inputs; labels are not used.
        ranges: "minmax" or "mse".
        bits: of weights and activations.
    """
    if data is None:
        raise InputError("quantize needs data: a few hundred examples that ranges are taken from")
    network = load_for(model, example, data) if not isinstance(model, Smaller) else model.network
    examples = _examples(data, network)
    batches = (inputs for inputs, _ in examples.batches(BATCH))
    method = StaticQuantization(ranges=ranges, bits=bits, saturation_free=not machine().vnni)
    plan = method.plan(network, collect(network, batches))
    before = model.plan if isinstance(model, Smaller) else Plan()
    original = model.original if isinstance(model, Smaller) else network
    return Smaller(plan.apply(network), original, before + plan, network)


def recover(
    pruned: Smaller,
    data: Any,
    *,
    seconds: float | None = None,
    epochs: float | None = None,
    seed: int = 0,
) -> Smaller:
    """Give quality back to a pruned network by distillation from its original.

    Args:
        pruned: what ``prune`` gave.
        data: training examples; labels are not used.
        seconds: time to train, or
        epochs: passes over the data.
        seed: of the order of the examples.
    """
    examples = _examples(data, pruned.network)
    done = train_student(
        pruned.network, pruned.original, examples, seconds=seconds, epochs=epochs, seed=seed
    )
    return Smaller(done.network, pruned.original, pruned.plan)


def export(
    model: Any, folder: str | Path, *, example: Example | None = None, target: str = "onnxruntime"
) -> Artifact:
    """Write a network for a runtime.

    Args:
        model: an ``nn.Module``, a path, or what ``prune``, ``quantize`` or ``recover`` gave.
        folder: an existing folder, or one to make.
        example: example inputs; None where the model brings its own.
        target: name of the runtime.

    Raises:
        RefusedError: the runtime cannot take the network.
    """
    network = _network(model, example)
    one = targets_for(target)[0]
    refusal = one.refuses(network)
    if refusal:
        raise InputError(f"{target} cannot take the network: {refusal}")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return one.lower(network, path)


def save(smaller: Smaller, folder: str | Path) -> None:
    """Write float weights (safetensors) and plan (JSON), from which ``load`` rebuilds the network. No class is pickled.

    Raises:
        OutputError: the folder exists and was not made by tinier, or cannot be written.
    """
    path = check_output(folder, lambda found: {p.name for p in found.iterdir()} <= {PLAN, WEIGHTS})
    with whole(path) as made:
        save_weights(smaller.trainable or smaller.network, made / WEIGHTS)
        (made / PLAN).write_text(smaller.plan.to_json())


def load(folder: str | Path, into: Any, example: Example | None = None) -> Smaller:
    """Rebuild the smaller float network from a folder that ``save`` or ``compress`` wrote.

    Args:
        folder: has ``plan.json`` and ``model.safetensors``.
        into: the original model: an ``nn.Module`` of the same class and sizes, or the path that it came from.
        example: example inputs.

    Raises:
        InputError: the folder has no plan, or it does not fit the model.
    """
    folder = Path(folder)
    for name in (PLAN, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} has no {name}; name a folder that save or compress wrote")
    network = _network(into, example)
    try:
        plan = Plan.from_json((folder / PLAN).read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / PLAN} cannot be read: {error}") from error
    # Ranges belong to the artifact: the weights on disk are float and trainable.
    plan = Plan(tuple(edit for edit in plan.edits if isinstance(edit, Slice)))
    smaller = plan.apply(network)
    try:
        smaller.module.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} does not fit the model: {error}") from error
    return Smaller(smaller, network, plan)


def _network(model: Any, example: Example | None) -> Network:
    if isinstance(model, Smaller):
        return model.network
    return model if isinstance(model, Network) else load_source(model, example)


def _examples(data: Any, network: Network) -> Examples:
    if isinstance(data, Examples):
        return data
    return read(data, network.example, tokenizer_folder=network.folder)
