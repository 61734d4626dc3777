"""The user's own class with smaller parameters: tensors are cut and the attributes that hold sizes put right."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from tinier.edits.rewrite import Kept, Rewriter, cut_tensors, kept_along
from tinier.graph.axes import Atom, Axis, Product, product, size
from tinier.graph.groups import Channels
from tinier.graph.macs import module_path

# Names under which attention modules keep what changes with their heads.
QUERY_HEADS = [
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "nhead",
    "num_attn_heads",
]
KEY_HEADS = ["num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head"]
QUERIES_PER_KEY = ["num_key_value_groups", "n_rep", "num_queries_per_kv"]
ATTENTION_WIDTH = ["all_head_size", "inner_dim", "split_size"]
AMBIGUOUS_WIDTH = ["embed_dim", "hidden_size", "dim", "d_model"]
CONFIG_WIDTH = ["intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "encoder_ffn_dim"]


def stock_modules(module: nn.Module, channels: Channels, kept: Kept) -> Iterable[nn.Module]:
    """Copies of the user's module with smaller parameters, the likeliest first.

    They differ in attributes of which the name does not say whether they hold the width of the attention or of the residual, and in
    whether the config follows; whoever asks tries which of them computes the right thing.

    Args:
        module: the original; left as it is.
        channels: its axes.
        kept: atom → (kept,) int64 positions that stay.
    """
    run = Rewriter(channels, kept)
    for ambiguous in (False, True):
        for config in (True, False):
            candidate = copy.deepcopy(module)
            _cut_layers(candidate, channels, run)
            _set_heads(candidate, channels, run, ambiguous)
            if config and not _set_config(candidate, channels, run):
                continue
            yield candidate


def _cut_layers(module: nn.Module, channels: Channels, run: Rewriter) -> None:
    cut_tensors(module, kept_along(channels, run.kept))
    groups = _new_groups(run)
    for path, layer in module.named_modules():
        _set_sizes(layer, groups.get(f"{path}.weight" if path else "weight"))


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


def _set_heads(module: nn.Module, channels: Channels, run: Rewriter, ambiguous: bool) -> None:
    layers = dict(module.named_modules())
    for node, (queries, keys) in channels.heads.items():
        if not run.changed(queries):
            continue
        old, new = size(queries), run.size(queries)
        keys = _stored(keys)
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


def _stored(keys: Axis) -> Axis:
    """Key heads as the parameters have them: without the factor by which they are repeated for their queries."""
    factors = keys.factors if isinstance(keys, Product) else (keys,)
    return product(*(f for f in factors if not (isinstance(f, Atom) and "repeated" in f.roles)))


def _head_dim(node: fx.Node) -> int:
    source: Any = node.args[0]
    length = source.meta["val"].shape[-1]
    return length if isinstance(length, int) else 0


def _assign(target: Any, values: Mapping[str, tuple[int, int]]) -> None:
    for name, (old, new) in values.items():
        value = getattr(target, name, None)
        if type(value) is int and value == old:
            setattr(target, name, new)


def _set_config(module: nn.Module, channels: Channels, run: Rewriter) -> bool:
    """Put a Hugging Face config right where every layer has the same new width; whether anything changed."""
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return False
    before = config.to_dict()
    for name in CONFIG_WIDTH:
        old = getattr(config, name, None)
        widths = {
            run.size(group.atom)
            for group in channels.groups
            if group.kind == "neuron" and group.size == old
        }
        if type(old) is int and len(widths) == 1:
            setattr(config, name, widths.pop())
    heads = {
        (run.size(queries), run.size(_stored(keys))) for queries, keys in channels.heads.values()
    }
    # Without a head_dim of its own a config derives it from the number of heads, which would then be wrong.
    if len(heads) == 1 and type(getattr(config, "head_dim", None)) is int:
        queries, keys = heads.pop()
        for names, count in ((QUERY_HEADS, queries), (KEY_HEADS, keys)):
            for name in names:
                if type(getattr(config, name, None)) is int:
                    setattr(config, name, count)
    return bool(config.to_dict() != before)
