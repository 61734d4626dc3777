"""What the weights of recurrent layers are multiplied with: inputs, and hidden states of the step before."""

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from tinier.graph.fold import parameter_of

aten = torch.ops.aten
# Operators that run all layers: (input, states, parameters, biased, layers, dropout, train, both ways, batch first).
WHOLE = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def column(node: str, weight: str) -> str:
    """Key of a weight of a recurrent layer in ``Statistics.columns``: one operator reads several."""
    return f"{node}:{weight}"


def reads(
    node: fx.Node, value: Tensor, state: Tensor, output: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Name of a weight, and (rows, n) what it is multiplied with.

    Args:
        node: one of ``WHOLE``.
        value: (length, batch, inputs), or (batch, length, inputs) where the batch comes first.
        state: (layers · ways, batch, hidden) hidden states before the first step.
        output: of the last layer, as ``value`` is, with ways · hidden.

    Yields:
        Weights of inputs of the first layer and of hidden states of the last one: what lies between layers is not seen. None of layers
        with projections.
    """
    parameters, biased, layers, _, _, both, first = node.args[2:9]
    assert isinstance(parameters, list | tuple) and isinstance(layers, int)
    ways, each = 2 if both else 1, 4 if biased else 2
    if len(parameters) != layers * ways * each or state.ndim != 3:
        return
    if first:
        value, output = value.transpose(0, 1), output.transpose(0, 1)
    hidden = state.shape[-1]
    for way in range(ways):
        name = parameter_of(parameters[way * each])
        if name:
            yield name, value.flatten(0, 1)
        place = (layers - 1) * ways + way
        name = parameter_of(parameters[place * each + 1])
        if name:
            own = output[..., way * hidden : (way + 1) * hidden]
            before = own[:-1] if way == 0 else own[1:]  # the second way goes from the end
            yield name, torch.cat([state[place][None], before]).flatten(0, 1)
