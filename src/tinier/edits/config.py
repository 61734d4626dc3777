"""A Hugging Face config that says what the smaller weights are, so that the class can be built from it alone."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from tinier.edits.config_numbers import Dim, Governed, governed
from tinier.edits.rewrite import Rewriter
from tinier.graph.axes import Atom, Axis, Product, product, size
from tinier.graph.groups import Channels
from tinier.graph.states import evaluating, quiet, repeatable
from tinier.graph.trace import call

# The field's names for what a config holds; one config has one or two of each row.
QUERY_HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_attn_heads",
    "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
NEURONS = (
    "intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size",
    "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim", "dim_feedforward", "feed_forward_hidden_size",
)  # fmt: skip
WIDTH = (
    "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim", "projection_dim",
    "encoder_hidden_size", "model_dim",
)  # fmt: skip
HEAD_DIM = ("head_dim", "d_kv", "attention_head_size", "kv_channels")
# Which kind of groups a number counts, where its name tells.
TABLE: tuple[tuple[tuple[str, ...], str], ...] = ((HEAD_DIM, "head_dim"), (EXPERTS, "expert"))


def stored(keys: Axis) -> Axis:
    """Key heads as the parameters have them: without the factor by which they are repeated for their queries."""
    factors = keys.factors if isinstance(keys, Product) else (keys,)
    return product(*(f for f in factors if not (isinstance(f, Atom) and "repeated" in f.roles)))


def config_says(module: nn.Module) -> Governed:
    """What the numbers of a module's config govern, with the size of heads and of neurons written where the config leaves them open.

    Cost:
        For each number that may be a width, the class built once without memory for its weights.
    """
    config: Any = getattr(module, "config", None)
    width, heads = first_number(config, WIDTH), first_number(config, QUERY_HEADS)
    left_open: dict[str, int] = {}
    if width and heads:
        # Classes with key heads of their own read a size of heads, whether or not their config has one.
        if first_number(config, KEY_HEADS) and not first_number(config, HEAD_DIM):
            left_open[HEAD_DIM[0]] = width // heads
        for name in NEURONS:
            if getattr(config, name, 0) is None:
                left_open[name] = 4 * width  # the convention of those who leave it open
    return governed(module, left_open)


def set_config(module: nn.Module, channels: Channels, run: Rewriter, says: Governed) -> bool:
    """Put the config of a module right in place, where every layer has the same new width.

    Args:
        module: its ``config`` is changed if it has one of transformers' form.
        channels: axes of the original.
        run: what is kept of them.
        says: what the config's numbers govern.

    Returns:
        Whether anything changed.
    """
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return False
    before = config.to_dict()
    widths = [first_number(part, WIDTH) for part in parts(config)]
    _set_widths(config, channels, run, says)
    for part, width in zip(parts(config), widths, strict=True):
        _set_part(part, channels, run, width)
    return bool(config.to_dict() != before)


def _set_widths(config: Any, channels: Channels, run: Rewriter, says: Governed) -> None:
    """Numbers shrink as all the dimensions that they govern do; those that govern the most first, the others by what is left."""
    left: dict[Dim, Fraction] = {}
    for name, axes in channels.parameters.items():
        for dim, axis in enumerate(axes):
            left[name, dim] = Fraction(run.size(axis), max(size(axis), 1))
    if says.written and any(ratio != 1 for ratio in left.values()):
        for name, value in says.written.items():
            setattr(config, name, value)
    for number, dims in sorted(says.dims.items(), key=lambda item: -len(item[1])):
        ratios = {left[dim] for dim in dims if dim in left}
        if len(ratios) != 1 or (ratio := ratios.pop()) == 1:
            continue
        new = number.value * ratio
        if new.denominator == 1:
            number.put(config, int(new))
            left |= {dim: left[dim] / ratio for dim in dims if dim in left}


def parts(config: Any) -> Iterator[Any]:
    """A config and the configs inside it, as those of text and of images."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from parts(value)


def first_number(config: Any, names: Sequence[str]) -> int | None:
    """The first of these attributes that a config has as a number."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if type(value) is int), None)


def _set_part(config: Any, channels: Channels, run: Rewriter, width: int | None) -> None:
    by_kind: dict[tuple[str, int], set[int]] = {}
    for group in channels.groups:
        by_kind.setdefault((group.kind, group.size), set()).add(run.size(group.atom))
    old_heads, new_width = first_number(config, QUERY_HEADS), first_number(config, WIDTH)
    named = first_number(config, HEAD_DIM) is not None
    for names, kind in TABLE:
        for name in names:
            old = getattr(config, name, None)
            new = by_kind.get((kind, old), set()) if type(old) is int else set()
            if len(new) == 1 and new != {old}:
                setattr(config, name, next(iter(new)))
    for which, names in ((0, QUERY_HEADS), (1, KEY_HEADS)):
        left = _heads(channels, run, which)
        for name in names:
            value: Any = getattr(config, name, None)
            if isinstance(value, list | tuple):  # one for each stage
                if all(len(left.get(count, ())) == 1 for count in value):
                    setattr(config, name, type(value)(next(iter(left[count])) for count in value))
                continue
            new = left.get(value, set()) if type(value) is int else set()
            # Without a head_dim of its own a config derives it from width and heads: both must shrink alike.
            alike = (
                old_heads
                and width
                and new_width
                and new_width * old_heads == width * min(new, default=0)
            )
            if len(new) == 1 and (named or alike or which):
                setattr(config, name, next(iter(new)))


def _heads(channels: Channels, run: Rewriter, which: int) -> Mapping[int, set[int]]:
    """Number of query heads (0) or key heads (1) → what is left of it, over all attention layers."""
    result: dict[int, set[int]] = {}
    for pair in channels.heads.values():
        axis = stored(pair[1]) if which else pair[0]
        result.setdefault(size(axis), set()).add(run.size(axis))
    return result


def standard(module: nn.Module, example: Mapping[str, Tensor]) -> bool:
    """Whether the module's class, built from its config alone, computes the same with its weights: ``from_pretrained`` loads it.

    Args and cost: see ``not_standard``.
    """
    return not not_standard(module, example)


def not_standard(module: nn.Module, example: Mapping[str, Tensor]) -> str:
    """What the module's class, built from its config alone, would have otherwise; empty if nothing, so that ``from_pretrained`` loads it.

    Scales, rotary frequencies and the like are no weights: a class derives them from its config, so that equal shapes are not enough.

    Args:
        module: a model of transformers, or anything else, which is not standard.
        example: input name → tensor, on which the outputs are compared to 1e-5 of the largest.

    Cost:
        A second model, and a run of both; shapes alone on the meta device.
    """
    config: Any = getattr(module, "config", None)
    if isinstance(module, fx.GraphModule):
        return "its class is not kept, what is left is the traced graph"
    if config is None or not hasattr(module, "save_pretrained"):
        return "its class has no config of transformers"
    state = module.state_dict()
    try:
        # As from_pretrained does: from what is written, which transformers checks.
        written = type(config).from_dict(copy.deepcopy(config.to_dict()))
        if callable(getattr(written, "validate", None)):
            written.validate()
        with quiet(), repeatable(), torch.device("meta"):
            built = type(module)(written)
        made = built.state_dict()
        for name in (*state, *made):
            found, wanted = (tuple(s[name].shape) if name in s else None for s in (state, made))
            if found != wanted:
                return f"{name} is {found or 'missing'}, its config makes it {wanted or 'missing'}"
        if any(t.is_meta for t in (*state.values(), *example.values())):
            return ""
        with quiet(), repeatable():
            built = type(module)(written).to(next(iter(state.values())).device)
        built.load_state_dict(state)
        with torch.no_grad(), evaluating(module), evaluating(built):
            pairs = zip(call(module, example), call(built, example), strict=True)
            same = all(
                float((a - b).abs().max()) <= 1e-5 * float(a.abs().max().clamp(min=1e-6))
                for a, b in pairs
                if a.is_floating_point() and a.numel()
            )
        return (
            ""
            if same
            else "a number that is no weight, as the scale of its attention, follows from its config"
        )
    except Exception as error:  # the class's own checks of sizes that do not go together
        return f"its config refuses: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
