"""The user's own class with smaller parameters: tensors are cut and the attributes that hold sizes put right."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from tinier.edits.config import (
    EXPERTS,
    KEY_HEADS,
    QUERY_HEADS,
    config_says,
    set_config,
    stored,
)
from tinier.edits.config_numbers import Governed
from tinier.edits.rewrite import Kept, Rewriter, cut_copy, kept_along
from tinier.edits.stock_keras import keras_modules
from tinier.edits.stock_pieces import Attributes, attributes, mend
from tinier.edits.stock_sizes import set_sizes
from tinier.graph.axes import size
from tinier.graph.groups import Channels
from tinier.graph.macs import module_path
from tinier.graph.states import forgotten
from tinier.graph.trace import Traced
from tinier.modules.keras import KerasModule

# Names under which attention modules keep what changes with their heads.
QUERIES_PER_KEY = ["num_key_value_groups", "n_rep", "num_queries_per_kv"]
ATTENTION_WIDTH = ["all_head_size", "inner_dim", "split_size"]
EXPERT_WIDTH = [
    "intermediate_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "ffn_dim",
    "expert_dim",
]
AMBIGUOUS_WIDTH = ["embed_dim", "hidden_size", "dim", "d_model"]


def stock_modules(
    module: nn.Module,
    channels: Channels,
    kept: Kept,
    traced: Traced | None = None,
    graph: fx.GraphModule | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    made: dict[str, Tensor] | None = None,
) -> Iterable[nn.Module]:
    """Copies of the user's module with smaller parameters, the likeliest first.

    They differ in attributes of which the name does not say whether they hold the width of the attention or of the residual, and in
    whether the config follows; whoever asks tries which of them computes the right thing.

    Args:
        module: the original; left as it is.
        channels: its axes.
        kept: atom → (kept,) int64 positions that stay.
        traced: its graph; with the next two, modules that cannot take their smaller weights are replaced one at a time.
        graph: the smaller graph.
        inputs: name → tensor, random.
        made: name → tensor that is cut already; the copies share their parameters with one another and with these, so that one may live on.
    """
    if isinstance(module, KerasModule):
        yield from keras_modules(module, channels, kept)
        return
    run = Rewriter(channels, kept)
    along, made = kept_along(channels, kept), {} if made is None else made
    says = config_says(module)
    _cut_unused(module, channels, says, along)
    follows = _follows(module, channels, run, says)
    # By names that the field knows, then by the sizes that operators work with.
    tried: list[Attributes] = []
    for ambiguous, sizes in ((False, None), (True, None), (False, True), (False, False)):
        for config in (True, False):
            if config and not follows:
                continue
            # In training, spectral norms change as they are looked at; what is kept from runs is of the old weights.
            candidate = forgotten(cut_copy(module, along, made))
            candidate.eval()
            if config:
                set_config(candidate, channels, run, says)
            _set_layers(candidate, run)
            if sizes is None:
                _set_heads(candidate, channels, run, ambiguous)
                _set_experts(candidate, channels, run)
            else:
                set_sizes(candidate, run, sizes)
            tried.append(attributes(candidate))
            yield candidate
    if traced is not None and graph is not None and inputs is not None:
        # The config stays as it was: it could not say what the pieces are.
        candidate = forgotten(cut_copy(module, along, made))
        candidate.eval()
        _set_layers(candidate, run)
        set_sizes(candidate, run, True)
        try:
            mended = mend(candidate, tried, module, traced, graph, run, inputs)
        except Exception:  # the user's code, called module by module: the whole graph stands in
            mended = False
        if mended:
            yield candidate


def _cut_unused(
    module: nn.Module, channels: Channels, says: Governed, along: dict[str, dict[int, Tensor]]
) -> None:
    """Parameters that the graph does not use, as tokens of masks, are cut as those that have the same number in the config."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for dims in says.dims.values():
        stays = {shapes[n][d]: along[n][d] for n, d in dims if d in along.get(n, {})}
        for name, dim in dims:
            if name not in channels.parameters and shapes[name][dim] in stays:
                along.setdefault(name, {})[dim] = stays[shapes[name][dim]]


def _follows(module: nn.Module, channels: Channels, run: Rewriter, says: Governed) -> bool:
    """Whether the config can follow the cut."""
    probe: Any = nn.Module()
    probe.config = copy.deepcopy(getattr(module, "config", None))
    return set_config(probe, channels, run, says)


def _set_layers(module: nn.Module, run: Rewriter) -> None:
    groups = _new_groups(run)
    for path, layer in module.named_modules():
        _set_sizes(layer, groups.get(f"{path}.weight" if path else "weight"))
    _set_plain_norms(dict(module.named_modules()), run)


def _set_plain_norms(layers: Mapping[str, Any], run: Rewriter) -> None:
    """Batch and instance norms without a weight have their width in their module's attribute alone."""
    for node in run.channels.axes:
        layer = layers.get(module_path(node)) if node.op == "call_function" else None
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.weight is None:
            axes = run.of(node)
            if len(axes) > 1 and layer.num_features == size(axes[1]):
                layer.num_features = run.size(axes[1])


def _new_groups(run: Rewriter) -> dict[str, int]:
    """Weight → number of groups, of convolutions and group norms."""
    result = {}
    for node, axis in run.channels.outer.items():
        for source in node.all_input_nodes[1:2]:
            if source.op == "get_attr":
                result[str(source.target)] = run.size(axis)
    return result


def _set_sizes(layer: Any, groups: int | None) -> None:
    """Make the attributes of a layer of torch.nn say what its weight says."""
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        _set_recurrent(layer)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return
    shape = tuple(weight.shape)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.modules.conv._ConvNd):
        layer.groups = groups if groups is not None else layer.groups
        first, second = shape[:2]
        if layer.transposed:
            layer.in_channels, layer.out_channels = first, second * layer.groups
        else:
            layer.out_channels, layer.in_channels = first, second * layer.groups
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = shape[0]
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        layer.normalized_shape = shape
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = shape[0]
        layer.num_groups = groups if groups is not None else layer.num_groups
    elif isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = shape
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = shape[0]
    elif type(layer).__name__ == "Conv1D" and len(shape) == 2:  # GPT-2's linear layer
        layer.nx, layer.nf = shape


def _set_recurrent(layer: Any) -> None:
    """Sizes of a recurrent layer, and its own list of its parameters."""
    many = isinstance(layer, nn.RNNBase)
    suffix = "_l0" if many else ""
    first, state = getattr(layer, f"weight_ih{suffix}"), getattr(layer, f"weight_hh{suffix}")
    kind = layer.mode if many else type(layer).__name__.removesuffix("Cell")
    layer.input_size = first.shape[1]
    layer.hidden_size = first.shape[0] // {"LSTM": 4, "GRU": 3}.get(kind, 1)
    if many:
        if layer.proj_size:
            layer.proj_size = state.shape[1]
        layer._init_flat_weights()


def _set_experts(module: nn.Module, channels: Channels, run: Rewriter) -> None:
    """Numbers of experts and their widths, in the modules that hold their stacked weights and in those around them."""
    layers = dict(module.named_modules())
    for group in channels.groups:
        names = EXPERTS if group.kind == "expert" else EXPERT_WIDTH
        if not run.changed(group.atom):
            continue
        for slot in group.slots:
            path = slot.parameter.rpartition(".")[0]
            for owner in (path, path.rpartition(".")[0])[: 2 if names is EXPERTS else 1]:
                _assign(layers.get(owner), dict.fromkeys(names, (group.size, run.size(group.atom))))


def _set_heads(module: nn.Module, channels: Channels, run: Rewriter, ambiguous: bool) -> None:
    layers = dict(module.named_modules())
    for node, (queries, keys) in channels.heads.items():
        if not run.changed(queries):
            continue
        old, new = size(queries), run.size(queries)
        keys = stored(keys)
        old_keys, new_keys = size(keys), run.size(keys)
        width = _head_dim(node)
        values = (
            dict.fromkeys(KEY_HEADS, (old_keys, new_keys))
            | dict.fromkeys(QUERIES_PER_KEY, (old // old_keys, new // new_keys))
            | dict.fromkeys(QUERY_HEADS, (old, new))
            | dict.fromkeys(ATTENTION_WIDTH, (old * width, new * width))
        )
        if ambiguous:
            values |= dict.fromkeys(AMBIGUOUS_WIDTH, (old * width, new * width))
        path = module_path(node)
        while path not in layers or not any(hasattr(layers[path], name) for name in values):
            if not path:
                break
            path = path.rpartition(".")[0]
        _assign(layers[path], values)


def _head_dim(node: fx.Node) -> int:
    source: Any = node.all_input_nodes[0]
    length = source.meta["val"].shape[-1]
    return length if isinstance(length, int) else 0


def _assign(target: Any, values: Mapping[str, tuple[int, int]]) -> None:
    """Change the numbers of a module, and those of its config, of which it gets a copy of its own: other layers share it."""
    wrong = _stale(target, values)
    for name in wrong:
        setattr(target, name, values[name][1])
    config = getattr(target, "config", None)
    if hasattr(config, "to_dict") and (wrong := _stale(config, values)):
        target.config = copy.copy(config)
        for name in wrong:
            setattr(target.config, name, values[name][1])


def _stale(target: Any, values: Mapping[str, tuple[int, int]]) -> list[str]:
    found = {name: getattr(target, name, None) for name in values}
    return [n for n, v in found.items() if type(v) is int and v == values[n][0] != values[n][1]]
