"""Whether examples fit a network: looked at before anything is spent on them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tinier.data.base import CHUNK, Examples
from tinier.errors import DataError
from tinier.network import Network

# Labels of positions that do not count, as torch.nn.CrossEntropyLoss and Hugging Face have them.
IGNORED = -100


def check(examples: Examples, network: Network) -> None:
    """Raise unless the examples fit the network's inputs, one batch runs, and the labels are classes that it has.

    Args:
        examples: as ``read`` gives them.
        network: the network that they are for.

    Raises:
        DataError: no examples; a shape or dtype that does not fit (which input, got, needed); NaN or infinity in an
            input or in the outputs of the first batch (which example); a label out of range (which example, its value).

    Cost:
        One pass over the data, unless they are decoded images; one run of one batch; the network's trace for inputs of
        free size.
    """
    _all_fit(_first(examples, network), network)
    outputs = runs(examples, network)
    labels = examples.labels()
    if labels is not None and outputs:
        check_labels(labels, outputs[0])


def runs(examples: Examples, network: Network) -> tuple[Tensor, ...]:
    """As ``check``, for data of which only the inputs count; they may have any shape on which the network runs.

    Returns:
        The network's outputs for the first batch.

    Raises:
        DataError: as ``check``, but for labels.
        RefusedError: the network is on the meta device.
    """
    first = _first(examples, network)
    count = len(next(iter(first.values())))
    network.need_values("run on data")
    _finite(examples)
    if count < _batch(network) and not network.traced.batched:
        raise DataError(
            f"the model takes batches of {_batch(network)} only, the data have {count} examples"
        )
    try:
        outputs = network(first)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        _all_fit(first, network)
        raise DataError(
            f"the model cannot run on the first {count} examples: {str(error).splitlines()[0]}; "
            + ", ".join(f"{name} is {tuple(value.shape)}" for name, value in first.items())
        ) from error
    for number, output in enumerate(outputs):
        if output.is_floating_point() and output.isnan().any() and output.ndim:
            row = int(output.isnan().flatten(1).any(1).int().argmax()) if output.ndim > 1 else 0
            raise DataError(
                f"the model's output {number} is NaN for example {row}, though its inputs are finite; "
                "look at the model's weights and at that example"
            )
    return outputs


def class_axis(shape: Sequence[int]) -> int | None:
    """The axis of an output that holds the scores of the classes, or None for one logit an example.

    (n, c): 1; (n, positions, c): the last, as language models have it; (n, c, height, width): 1.
    """
    if len(shape) < 2 or (len(shape) == 2 and shape[1] == 1):
        return None
    return len(shape) - 1 if len(shape) == 3 else 1


def _first(examples: Examples, network: Network) -> dict[str, Tensor]:
    if not len(examples):
        raise DataError(f"{examples.origin or 'the data'}: there are no examples")
    count = min(len(examples), _batch(network))
    first, _ = next(examples.subset(range(count)).batches(count))
    for name in network.example:
        if name not in first:
            raise DataError(f"the data have no input {name}; they have {', '.join(first)}")
    return first


def _all_fit(first: Mapping[str, Tensor], network: Network) -> None:
    for name, wanted in network.example.items():
        _fits(name, first[name], wanted, network)


def _batch(network: Network) -> int:
    return len(next(iter(network.example.values())))


def _fits(name: str, got: Tensor, wanted: Tensor, network: Network) -> None:
    if got.dtype != wanted.dtype:
        raise DataError(f"{name}: the data are {got.dtype}, the model needs {wanted.dtype}")
    needed: tuple[int | str, ...] = tuple(wanted.shape[1:])
    if needed == tuple(got.shape[1:]):
        return
    if got.ndim == wanted.ndim and not got.is_floating_point():
        # Of integer inputs (token ids) every dimension that the model lets free is free.
        traced = network.traced.module.graph.find_nodes(op="placeholder", target=name)
        sizes = traced[0].meta["val"].shape[1:] if traced else ()
        needed = tuple(size if isinstance(size, int) else "any" for size in sizes)
        if all(n in ("any", g) for n, g in zip(needed, got.shape[1:], strict=True)):
            return
    raise DataError(
        f"{name}: each example has shape {tuple(got.shape[1:])}, the model needs "
        f"{_shape(needed)}{_hint(tuple(got.shape[1:]), tuple(wanted.shape[1:]))}"
    )


def _shape(sizes: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"


def _hint(got: tuple[int, ...], needed: tuple[int, ...]) -> str:
    if len(got) == 3 and len(needed) == 3 and (got[2], *got[:2]) == needed:
        return "; the channels are last: x.transpose(0, 3, 1, 2) puts them first"
    if needed == (1, *got):
        return "; the channel dimension is missing: x[:, None] adds it"
    size = torch.Size(got).numel()
    if size == torch.Size(needed).numel():
        return (
            f"; x.reshape(len(x), {', '.join(map(str, needed))}) if the order of values is the same"
        )
    return "; prepare the data as the model was trained: cut, pad or resize them to that"


def _finite(examples: Examples) -> None:
    if examples.store.finite:
        return
    start = 0
    for inputs, labels in examples.batches(CHUNK):
        tensors = dict(inputs)
        if labels is not None:
            tensors["labels"] = labels
        for name, value in tensors.items():
            if not value.is_floating_point() or value.isfinite().all():
                continue
            rows = (~value.isfinite()).reshape(len(value), -1).any(1)
            row = int(rows.int().argmax())
            kind = "NaN" if value[row].isnan().any() else "infinity"
            raise DataError(
                f"{name}: example {start + row} has {kind} in it; mend or remove it (np.isfinite)"
            )
        start += len(next(iter(inputs.values())))


def check_labels(labels: Tensor, output: Tensor) -> None:
    """Raise ``DataError`` where a label is no class of an output, with the example and its value."""
    axis = class_axis(output.shape)
    # Floats, and integers of the output's own shape, are values or several labels an example, not class indices.
    if axis is None or labels.is_floating_point() or labels.ndim != output.ndim - 1:
        return
    classes = output.shape[axis]
    wrong = (labels < 0) | (labels >= classes)
    if labels.ndim > 1:
        wrong &= labels != IGNORED
    if wrong.any():
        row = int(wrong.reshape(len(wrong), -1).any(1).int().argmax())
        value = int(labels[row][wrong[row]].flatten()[0])
        raise DataError(
            f"label of example {row} is {value}, but the model has {classes} classes: labels are 0 to "
            f"{classes - 1}" + ("; do yours start at 1?" if value == classes else "")
        )
