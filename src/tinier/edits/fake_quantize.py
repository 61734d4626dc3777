"""A quantized network as one that can be trained: its plan as quantizers with learned steps, and back to a plan."""

from collections.abc import Container, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from tinier.edits.assign import Assign, Fold
from tinier.edits.base import Edit, Plan, Values
from tinier.edits.pairs import as_matrix, from_matrix, integer_biases, name_outputs
from tinier.edits.quantize import Quantize, QuantizeWeight, refuse_quantized
from tinier.errors import InputError, RefusedError
from tinier.graph.fold import fold, read
from tinier.graph.placement import place
from tinier.modules.fake_quantize import ActivationQuantizer, BiasQuantizer, Step, WeightQuantizer
from tinier.network import Network
from tinier.tensors.affine import within
from tinier.tensors.saturation import without_saturation

T = TypeVar("T", bound=nn.Module)

QUANTIZERS = "quantizers"  # the module that all of them are in
TRAINED = "trained quantized"
_LARGEST = torch.finfo(torch.float32).max
# A weight that starts on an integer of its own choice is this part of a step inside of what rounds to it.
_INSIDE = 0.49


def trainable(network: Network, plan: Plan) -> Network:
    """The network that a plan quantizes, with quantizers that can be trained in place of integers.

    Batch norms are folded before training, so that there are no statistics to freeze: every weight is trained as it is stored. Values
    that share a scale in the plan (concatenations, what only moves values) share one step. Where the plan's range lies within the bounds
    of a clamp, so that runtimes leave the clamp out, the step stays small enough for that. Biases are rounded as integer operators do.

    Args:
        network: the float network that the plan is for; left as it is.
        plan: edits that give the folded network, then `Quantize` and `QuantizeWeight`, as ``tinier.quantize`` makes it.

    Returns:
        A graph with the folded network's parameters and one ``theta`` for each step, all trainable; untrained, it computes what
        ``plan.apply(network)`` does, to float rounding.

    Raises:
        InputError: the plan quantizes nothing, or changes the network after quantizing it.
        RefusedError: it does not fit the network.

    Cost:
        A copy of the parameters. A training step keeps the values before each quantizer beside those after it.

    Source:
        Esser et al. 2020, "Learned step size quantization"; Jacob et al. 2018, section 3, for batch norms and biases.

    Differs:
        Steps are learned by their logarithm; batch norms are folded with their running statistics, not with those of the batch.
    """
    before, edits = split(plan)
    folded = before.apply(network)
    refuse_quantized(folded)
    traced = folded.traced
    module = fold(traced.module)
    nodes = {node.name: node for node in module.graph.nodes}
    activations = [edit for edit in edits if isinstance(edit, Quantize)]
    weights = [edit for edit in edits if isinstance(edit, QuantizeWeight)]
    for edit in activations:
        if edit.tensor not in nodes:
            raise RefusedError(f"{network.name} has no value {edit.tensor} to quantize")
    for one in weights:
        if read(module, one.tensor) is None:
            raise RefusedError(f"{network.name} has no parameter {one.tensor} to quantize")
    names = {one.tensor for one in weights}
    made = _activations(module, activations, names)
    inputs = {edit.tensor: own for edit, own in zip(activations, made, strict=True)}
    stored = {edit.tensor: _weight(module, edit) for edit in weights}
    plain = {
        name
        for name, own in stored.items()
        if own.step.start.shape[1] == 1 and not bool(own.zero_point.any())
    }
    module.add_module(QUANTIZERS, nn.Module())
    biases = integer_biases(module, inputs, plain)
    for number, bias in enumerate(biases):
        own_bias = BiasQuantizer(inputs[bias.source], stored[bias.weight])
        _insert(module, bias.argument, f"bias_{number}", own_bias, (bias.reader.name,))
    for number, edit in enumerate(activations):
        name = f"activation_{number}"
        _insert(module, nodes[edit.tensor], name, inputs[edit.tensor], edit.readers)
    for number, one in enumerate(weights):
        for node in list(module.graph.find_nodes(op="get_attr")):
            if node.target == one.tensor:
                _insert(module, node, f"weight_{number}", stored[one.tensor], one.readers)
    name_outputs(module, traced)
    module.graph.lint()
    module.recompile()
    return Network(module, folded.example, network.name, network.folder, network.notes)


def plan_of(trained: Network, plan: Plan) -> Plan:
    """The plan with the weights, biases, integers and steps of a trained network.

    Args:
        trained: what ``trainable`` gave for ``plan``, trained.
        plan: that plan.

    Returns:
        A plan that, applied to the network that ``plan`` is for, computes what ``trained`` does, to float rounding.

    Raises:
        InputError: the trained network is of another plan.
    """
    before, edits = split(plan)
    module = trained.module
    parameters = {
        name: parameter.detach().clone(memory_format=torch.contiguous_format)
        for name, parameter in module.named_parameters()
        if not name.startswith(f"{QUANTIZERS}.")
    }
    values = dict(parameters)
    result: list[Edit] = []
    weights = activations = 0
    for edit in edits:
        if isinstance(edit, Quantize):
            own = _quantizer(module, f"activation_{activations}", ActivationQuantizer)
            activations += 1
            result.append(replace(edit, scale=float(own.step().detach())))
        elif isinstance(edit, QuantizeWeight):
            of = _quantizer(module, f"weight_{weights}", WeightQuantizer)
            weights += 1
            made = replace(edit, scale=Values(of.step().detach().clone()), integers=None)
            if edit.tensor not in parameters:
                raise InputError(f"the trained network has no {edit.tensor}: it is of another plan")
            values[edit.tensor] = parameters[edit.tensor] * of.unit
            result.append(replace(made, integers=Values(made.matrix(values[edit.tensor]))))
    return Plan((*_assigned(before, values), *result))


def split(plan: Plan) -> tuple[Plan, list[Edit]]:
    """The edits that give the folded network, and those that quantize it.

    Raises:
        InputError: the plan quantizes nothing, or changes the network after quantizing it.
    """
    quantizing = [isinstance(edit, Quantize | QuantizeWeight) for edit in plan.edits]
    if not any(quantizing):
        raise InputError("the plan quantizes nothing; give what tinier.quantize made")
    first = quantizing.index(True)
    if not all(quantizing[first:]):
        other = plan.edits[first + quantizing[first:].index(False)]
        raise InputError(
            f"the plan has {other.kind} after quantization; only the last step can be it"
        )
    before = plan.edits[:first]
    if not any(isinstance(edit, Fold) for edit in before):
        before = (*before, Fold())
    return Plan(before), list(plan.edits[first:])


def repair_saturation(trained: Network, plan: Plan) -> tuple[str, ...]:
    """Let the steps of trained weights grow, in place, until no 16-bit sum of u8 × s8 products can saturate.

    Args:
        trained: what ``trainable`` gave for ``plan``, trained; the steps of channels that break the limit are changed.
        plan: that plan.

    Returns:
        A note for each weight that was changed.
    """
    notes = []
    weights = [edit for edit in split(plan)[1] if isinstance(edit, QuantizeWeight)]
    for number, edit in enumerate(weights):
        own = _quantizer(trained.module, f"weight_{number}", WeightQuantizer)
        weight, step = read(trained.module, edit.tensor), own.step().detach()
        wide = edit.high > 127 or edit.low < -128
        if weight is None or wide or step.shape[1] > 1 or bool(own.zero_point.any()):
            continue
        rows = (weight.detach() * own.unit).movedim(edit.axis, 0)
        found, channels = without_saturation(
            rows, step[:, 0].expand(len(rows)).contiguous(), own.integers
        )
        if channels and len(step) == len(rows):
            own.step.restart(found[:, None])
            notes.append(
                f"{edit.tensor}: {len(channels)} channels scaled down, so that no sum saturates"
            )
        elif channels:
            own.step.restart(found.max().expand_as(step))
            notes.append(f"{edit.tensor}: scaled down, so that no sum saturates")
    return tuple(notes)


def _activations(
    module: fx.GraphModule, edits: list[Quantize], weights: Container[str]
) -> Iterator[ActivationQuantizer]:
    """The quantizers; those of values that share a scale share their step."""
    steps: dict[tuple[object, ...], Step] = {}
    placement = place(module, lambda name: name not in weights)
    limits: dict[tuple[object, ...], float] = {}
    keys = []
    for edit in edits:
        root = placement.shares.get(edit.tensor, edit.tensor)
        key = (root, edit.scale, edit.zero_point, edit.low, edit.high)
        keys.append(key)
        bounds = placement.bounds.get(edit.tensor)
        if bounds is not None:
            limit = _limit(edit, *bounds)
            if edit.scale <= limit:
                limits[key] = min(limit, limits.get(key, limit))
    for key, edit in zip(keys, edits, strict=True):
        if key not in steps:
            steps[key] = Step(torch.tensor(edit.scale), limits.get(key, torch.inf))
        yield ActivationQuantizer(steps[key], edit.zero_point, edit.integers)


def _limit(edit: Quantize, low: float, high: float) -> float:
    """The largest step whose representable values lie within a clamp's bounds; 0 where none does."""
    if (low == 0 and edit.zero_point > edit.low) or (high == 0 and edit.zero_point < edit.high):
        return 0.0
    most = within(torch.tensor(_LARGEST), torch.tensor(edit.zero_point), edit.integers, low, high)
    return torch.inf if float(most) == _LARGEST else float(most)


def _weight(module: fx.GraphModule, edit: QuantizeWeight) -> WeightQuantizer:
    """The quantizer of a weight, which is moved to where it rounds to the integers that the plan chose, and put in its unit."""
    grid, weight = edit.grid, read(module, edit.tensor)
    assert weight is not None
    own = WeightQuantizer(
        Step(edit.scale.tensor), edit.zero_point.tensor, grid.integers, edit.axis, weight
    )
    with torch.no_grad():
        if edit.integers is not None:
            matrix = as_matrix(weight, edit.axis)
            scale, zero_point = grid.columns(matrix.shape[1])
            steps = edit.integers.tensor.long() - zero_point  # (m, n)
            inside = matrix.clamp((steps - _INSIDE) * scale, (steps + _INSIDE) * scale)
            # At the ends of the grid all that lies beyond rounds to them as well.
            kept = grid.quantize(matrix) == edit.integers.tensor
            weight.copy_(from_matrix(torch.where(kept, matrix, inside), weight, edit.axis))
        weight.div_(own.unit)
    return own


def _insert(
    module: fx.GraphModule, node: fx.Node, name: str, own: nn.Module, readers: tuple[str, ...]
) -> None:
    """Who reads the node reads it through a quantizer; all its readers where none are named."""
    users = [user for user in node.users if not readers or user.name in readers]
    if not users:
        return
    path = f"{QUANTIZERS}.{name}"
    module.add_submodule(path, own)
    with module.graph.inserting_after(node):
        value = module.graph.call_module(path, (node,))
    value.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, value)


def _quantizer(module: nn.Module, name: str, kind: type[T]) -> T:
    found = getattr(getattr(module, QUANTIZERS, None), name, None)
    if not isinstance(found, kind):
        raise InputError(f"the trained network has no quantizer {name}: it is of another plan")
    return found


def _assigned(before: Plan, values: dict[str, Tensor]) -> Iterator[Edit]:
    """The edits, and all parameters with new values."""
    left = dict(values)
    for edit in before.edits:
        if isinstance(edit, Assign) and edit.tensor in left:
            yield replace(edit, values=Values(left.pop(edit.tensor)), reason=TRAINED)
        else:
            yield edit
    for name, value in left.items():
        yield Assign(name, Values(value), reason=TRAINED)
