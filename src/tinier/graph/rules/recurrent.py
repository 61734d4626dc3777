"""Recurrent layers: hidden units leave with their gates, their state, and what the next layer reads of them."""

from typing import Any

from torch import fx

from tinier.graph.axes import Axis, concat, fresh, mark, size
from tinier.graph.rules.base import Axes, Flow, Result, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def named(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by the names of its schema."""
    schema: Any = node.target._schema.arguments  # type: ignore[union-attr]
    given = {item.name: value for item, value in zip(schema, node.args, strict=False)}
    return given | dict(node.kwargs)


def layers(node: fx.Node) -> list[list[list[fx.Node]]]:
    """Layer → direction → its parameters: input to hidden, hidden to hidden, biases, projection."""
    given = named(node)
    params, directions = list(given["params"]), 2 if given["bidirectional"] else 1
    each = len(params) // (given["num_layers"] * directions)
    runs = [params[start : start + each] for start in range(0, len(params), each)]
    return [runs[start : start + directions] for start in range(0, len(runs), directions)]


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(flow: Flow, node: fx.Node) -> Result:
    """One hidden size for all layers and directions of a call, because their states are one tensor; gates are hidden units again.

    Weights are w_ih (gates · hidden, input), w_hh (gates · hidden, hidden or projected), w_hr (projected, hidden).
    """
    name = node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    given, stack, gates = named(node), layers(node), GATES[name]
    x = list(flow.of(given.get("input", given.get("data"))))
    shape = stack[0][0][0].meta["val"].shape
    hidden: Axis = fresh(shape[0] // gates)
    mark(hidden, "hidden")
    projected = hidden
    if len(stack[0][0]) in (3, 5) and name == "lstm":  # w_ih, w_hh, (two biases,) w_hr
        projected = fresh(stack[0][0][-1].meta["val"].shape[0])
        mark(projected, "hidden")
    below = x[-1]
    for directions in stack:
        for params in directions:
            _cell(flow, node, params, below, hidden, projected, gates)
        below = concat(*[projected] * len(directions))
    states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
    batch: Axis | None = None
    for state, own in zip(states, (projected, hidden), strict=False):
        axes = flow.of(state)
        flow.pin(node, axes[0], "layers and directions")
        flow.same(node, axes[-1], own)
        batch = axes[-2] if len(axes) == 3 else None
    rows = x[:-1]
    for axis in (*rows, *flow.of(given.get("batch_sizes"))):
        flow.pin(node, axis, "steps or batch")
    counted = fresh(len(stack) * len(stack[0]))
    flow.pin(node, counted, "layers and directions")
    final: Axes = [counted, *([] if batch is None else [batch])]
    outputs: list[Axes] = [[*rows, below], [*final, projected]]
    if name == "lstm":
        outputs.append([*final, hidden])
    return tuple(outputs)


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(flow: Flow, node: fx.Node) -> Result:
    """One step of one layer."""
    given, name = named(node), node.target._schema.name.split("::")[1]  # type: ignore[union-attr]
    gates = GATES[name.removesuffix("_cell")]
    x = flow.of(given["input"])
    params = [given[key] for key in ("w_ih", "w_hh", "b_ih", "b_hh") if given.get(key) is not None]
    hidden: Axis = fresh(params[0].meta["val"].shape[0] // gates)
    mark(hidden, "hidden")
    _cell(flow, node, params, x[-1], hidden, hidden, gates)
    states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
    for state in states:
        flow.same(node, flow.of(state)[-1], hidden)
    result: Axes = [*x[:-1], hidden]
    return (result, list(result)) if name == "lstm_cell" else result


def _cell(
    flow: Flow,
    node: fx.Node,
    params: list[fx.Node],
    below: Axis,
    hidden: Axis,
    projected: Axis,
    gates: int,
) -> None:
    rows = concat(*[hidden] * gates)
    for position, param in enumerate(params):
        axes = flow.of(param)
        if len(axes) == 2 and size(axes[0]) != size(rows):
            flow.same(node, axes[0], projected)
            flow.same(node, axes[1], hidden)
            continue
        flow.same(node, axes[0], rows)
        if len(axes) == 2:
            flow.same(node, axes[1], below if position == 0 else projected)
