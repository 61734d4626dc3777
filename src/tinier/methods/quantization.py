"""Quantization after training: integer weights, and activations rounded to ranges that data showed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tinier.edits.base import Plan
from tinier.edits.quantize import Quantize, QuantizeDynamically, QuantizeWeight, refuse_quantized
from tinier.errors import InputError, RefusedError
from tinier.graph.fold import fold
from tinier.graph.layers import linear_layer
from tinier.graph.placement import ROLES, Placement, place
from tinier.graph.stored import Store, stored
from tinier.methods.activation_integers import ActivationScheme, activations_of
from tinier.methods.base import Method, covers, must_exist
from tinier.methods.weight_integers import ROUNDINGS, Known, Scheme, known_integers
from tinier.network import Network
from tinier.statistics import Statistics
from tinier.tensors.ranges import RULES
from tinier.units import is_whole

DYNAMIC = (  # products whose inputs are rounded in the range of each run
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
)
RULES_OF_BOTH = ("minmax", "percentile", "mse")  # of weights and of activations
WEIGHT_RULES = ("minmax", "percentile", "mse", "importance")


@dataclass(frozen=True)
class Quantization(Method):
    """Weights with one scale a channel, tensor or group of inputs; activations with one scale a tensor, or left float.

    Attributes:
        bits: of weights, 2 to 16; up to 8 where activations stay float.
        activations: bits of activations, 2 to 16; None leaves them float: weights alone are stored as integers.
        symmetric_activations: zero points of activations are 0, for hardware that has none: integers of both signs, half of which are
            unused where values are never negative.
        dynamic: with ``activations=None``: inputs of linear layers are rounded to 8 bits in the range of each run, and multiplied as
            integers. Needs no data.
        per_token: dynamic ranges are those of each row of the last axis, symmetric, not of the whole tensor.
        ranges: of activations: ``"minmax"``, ``"percentile"``, ``"moving_average"``, ``"mse"`` for the least squared error, or
            ``"importance"`` for the least squared error of what the outputs depend on, or ``"entropy"`` for the least KL divergence:
            `tinier.tensors.ranges.RULES`.
        weight_ranges: of weights: ``"minmax"``, ``"percentile"``, ``"mse"``, or ``"importance"``: least squared error of each weight times
            the mean square of its input; None for what ``ranges`` is where that is one of the first three, else ``"mse"``.
        group: inputs of a linear layer or entries of an embedding that share a scale; None for one scale a channel. Weights alone only.
        per_tensor: one scale for all channels of a weight, for hardware that has no scale a channel.
        symmetric: zero points of weights are 0. Integer operators need that; for weights alone it can be false. None for true, but for
            weights alone of less than 8 bits.
        rounding: ``"nearest"``; ``"error_feedback"``: what rounding one weight changes, the others of its channel take up, as far as the
            inputs allow; ``"hqq"``: without data, the least error in a norm that forgives outliers.
        layers: pattern of modules or parameters → bits of weights there, 0 for float; the first that fits counts.
        exclude: patterns of modules or parameters that stay float.
        others: whether weights that no integer operator reads are stored as integers, too: recurrent layers, embeddings, transposed
            convolutions.
        saturation_free: scale weights so that 16-bit sums of u8 × s8 kernels cannot saturate; needed on x86 CPUs without
            VNNI, and costs accuracy elsewhere.

    Source:
        Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
    """

    name: ClassVar[str] = "quantization"

    bits: int = 8
    activations: int | None = 8
    symmetric_activations: bool = False
    dynamic: bool = False
    per_token: bool = False
    ranges: str = "mse"
    weight_ranges: str | None = None
    group: int | None = None
    per_tensor: bool = False
    symmetric: bool | None = True
    rounding: str = "nearest"
    layers: tuple[tuple[str, int], ...] = ()
    exclude: tuple[str, ...] = ()
    others: bool = True
    saturation_free: bool = False

    def __post_init__(self) -> None:
        if self.ranges not in RULES:
            raise InputError(f"ranges={self.ranges!r}: {', '.join(RULES)} are known")
        if self.weight_ranges not in (None, *WEIGHT_RULES):
            raise InputError(
                f"weight_ranges={self.weight_ranges!r}: {', '.join(WEIGHT_RULES)} are known"
            )
        if self.rounding not in ROUNDINGS:
            raise InputError(f"rounding={self.rounding!r}: {', '.join(ROUNDINGS)} are known")
        most = 16 if self.activations is not None else 8
        alone = "" if self.activations is not None else " for weights alone"
        for what, bits in (("bits", self.bits), *((f"layers: {p}", b) for p, b in self.layers)):
            if bits == 0 and what != "bits" and is_whole(bits):
                continue
            if not is_whole(bits) or not 2 <= bits <= most:
                zero = ", or 0 for float" if what != "bits" else ""
                raise InputError(
                    f"{what}={bits!r}: 2 to {most} are possible{alone}, as a whole number{zero}"
                )
        if self.activations is not None and (
            not is_whole(self.activations) or not 2 <= self.activations <= 16
        ):
            raise InputError(
                f"activations={self.activations!r}: 2 to 16 bits, a whole number, are possible, or None"
            )
        if self.group is not None and (not is_whole(self.group) or self.group < 2):
            raise InputError(
                f"group={self.group!r}: a whole number of 2 or more inputs, or None for whole channels"
            )
        if self.symmetric not in (None, True, False):
            raise InputError(f"symmetric={self.symmetric!r}: True, False or None is needed")
        if self.per_tensor and self.group is not None:
            raise InputError(
                f"per_tensor=True: one scale a tensor, and group={self.group} asks for one a group of inputs; leave one out"
            )
        if self.symmetric_activations and self.activations is None:
            raise InputError(
                "symmetric_activations=True: activations stay float or have the range of each run; give activations=8"
            )
        if self.per_token and not self.dynamic:
            raise InputError("per_token=True: that is of dynamic ranges; give dynamic=True")
        if self.dynamic and self.activations is not None:
            raise InputError(
                f"activations={self.activations}: dynamic ranges are for activations=None"
            )
        fixed = self.activations is not None or self.dynamic
        if fixed and (self.group is not None or self.symmetric is False):
            what = f"group={self.group}" if self.group is not None else "symmetric=False"
            raise InputError(
                f"{what}: integer operators take weights with one scale a channel and no zero point; "
                "give activations=None to store weights alone"
            )

    @property
    def needs(self) -> frozenset[str]:
        """What of ``statistics.observe`` the weights need, beside the ranges of activations."""
        return frozenset({"gram"} if self.rounding == "error_feedback" else ())

    @property
    def collects(self) -> frozenset[str]:
        """What of ``statistics.collect`` the weights need: moments of columns take flat memory, and there are some of layers that have no
        Gram matrix."""
        found = {"columns"} if self.weight_rule == "importance" else set()
        if self.activations is not None and self.ranges == "importance":
            found.add("importance")
        return frozenset(found)

    @property
    def weight_rule(self) -> str:
        """The rule that ranges of weights have."""
        return self.weight_ranges or (self.ranges if self.ranges in RULES_OF_BOTH else "mse")

    def plan(self, network: Network, statistics: Statistics | None = None) -> Plan:
        """Choose the scales.

        Args:
            network: a float network; left as it is.
            statistics: of this network: from `tinier.statistics.collect` for activations and what ``collects`` says, from ``observe`` what
                ``needs`` says.

        Raises:
            InputError: statistics are missing, a pattern is of nothing, or a group size does not divide.
            RefusedError: the network is quantized already, has nothing to quantize, or the statistics are of another.
        """
        return self.decide(network, statistics)[0]

    def decide(
        self,
        network: Network,
        statistics: Statistics | None = None,
        known: Known | None = None,
    ) -> tuple[Plan, tuple[str, ...]]:
        """As ``plan``, and what there is to say of single layers.

        Args:
            network: as for ``plan``.
            statistics: as for ``plan``.
            known: integers of weights, for decisions about one network with one set of statistics: those found here are added, and those
                of the same scheme and scales of inputs are not worked out again.
        """
        known = {} if known is None else known
        refuse_quantized(network)
        if statistics is None and (self.activations is not None or self.needs or self.collects):
            raise InputError("quantization needs data: statistics=collect(network, batches)")
        module = fold(network.traced.module)
        if "columns" in self.collects and statistics is not None:
            self._weighable(module, statistics)
        names = [str(node.target) for node in module.graph.find_nodes(op="get_attr")]
        must_exist((*self.exclude, *(pattern for pattern, _ in self.layers)), network, names)
        placement = Placement()
        if self.activations is not None:
            placement = place(module, lambda name: not self.bits_of(name))
        stores = self._stores(module, placement)
        if not stores:
            raise RefusedError(f"{network.name} has no weight to quantize")
        edits: list[Quantize] = []
        if self.activations is not None and statistics is not None:
            edits = activations_of(network, placement, statistics, self._activation_scheme)
        steps = {edit.tensor: edit.scale for edit in edits}
        multiplied, dynamic = self._dynamic(network.name, module, stores)
        weights: list[QuantizeWeight] = []
        notes: list[tuple[str, str]] = []
        for store in stores:
            fixed = store.name in placement.weights or store.name in multiplied
            scheme, own = self.scheme(store.name, fixed), steps if fixed else {}
            edit, said = known_integers(known, module, store, scheme, statistics, own)
            weights.append(edit)
            notes += [(store.name, text) for text in said]
        result = together(notes)
        floats = [s for s in stores if s.name not in multiplied and s.kind != "embedding"]
        if self.dynamic and floats:
            result += (
                f"{len(floats)} weights are stored as integers and computed in float, such as those of convolutions and recurrent layers: "
                "ranges of each run are for linear layers",
            )
        return Plan((*edits, *dynamic, *weights)), result

    def _dynamic(
        self, name: str, module: fx.GraphModule, stores: list[Store]
    ) -> tuple[set[str], list[QuantizeDynamically]]:
        """Weights of integer products, and the inputs that are rounded for them."""
        if not self.dynamic:
            return set(), []
        nodes = {node.name: node for node in module.graph.nodes}
        names: set[str] = set()
        readers: dict[str, list[str]] = {}
        for store in stores:
            products = [nodes[n] for n in store.readers if store.kind == "linear"]
            for node in products:
                if node.target in DYNAMIC:
                    source = node.args[ROLES[node.target].weight_input]
                    assert isinstance(source, fx.Node)
                    names.add(store.name)
                    readers.setdefault(source.name, []).append(node.name)
        edits = [QuantizeDynamically(n, tuple(r), self.per_token) for n, r in readers.items()]
        if not edits:
            raise RefusedError(
                f"{name}: no linear layer is there to multiply what is rounded in the range of each run; convolutions would be slower than "
                "in float, and what recurrent layers gave would depend on the threads: give activations=8 for static ranges, or None"
            )
        return names, edits

    def _weighable(self, module: fx.GraphModule, statistics: Statistics) -> None:
        layers = any(linear_layer(node) is not None for node in module.graph.nodes)
        if layers and not statistics.columns and not statistics.grams:
            raise InputError(
                'weight_ranges="importance": the statistics have no moments of columns; '
                'collect(network, batches, needs=("columns",)) gives them'
            )

    def bits_of(self, name: str) -> int:
        """Bits of a weight; 0 where it stays float."""
        if covers(self.exclude, name):
            return 0
        return next((bits for pattern, bits in self.layers if covers((pattern,), name)), self.bits)

    def skipped(self, network: Network) -> list[tuple[str, str, str]]:
        """(node, operator, reason) of each operator that stays float."""
        if self.activations is None:
            return []
        module = fold(network.traced.module)
        return place(module, lambda name: not self.bits_of(name)).skipped

    def stores(self, network: Network) -> list[Store]:
        """The weights that become integers, in the order of the graph."""
        module = fold(network.traced.module)
        placement = Placement()
        if self.activations is not None:
            placement = place(module, lambda name: not self.bits_of(name))
        return self._stores(module, placement)

    def roundings(
        self, network: Network, statistics: Statistics | None = None
    ) -> list[Quantize | QuantizeDynamically]:
        """How activations are rounded; arguments and errors as of ``plan``."""
        module = fold(network.traced.module)
        if self.activations is None:
            return [*self._dynamic(network.name, module, self._stores(module, Placement()))[1]]
        if statistics is None:
            raise InputError("quantization needs data: statistics=collect(network, batches)")
        placement = place(module, lambda name: not self.bits_of(name))
        return [*activations_of(network, placement, statistics, self._activation_scheme)]

    def _stores(self, module: fx.GraphModule, placement: Placement) -> list[Store]:
        """The weights to store, in the order of the graph."""
        known = stored(module)
        chosen = {
            name: Store(name, known[name].kind if name in known else "linear", axis, users)
            for name, (axis, users) in placement.weights.items()
        }
        if self.activations is None or self.others:
            for name, store in known.items():
                if self.bits_of(name) and name not in chosen:
                    chosen[name] = store
        order = {str(n.target): i for i, n in enumerate(module.graph.find_nodes(op="get_attr"))}
        return sorted(chosen.values(), key=lambda store: order[store.name])

    @property
    def _activation_scheme(self) -> ActivationScheme:
        return ActivationScheme(self.activations or 8, self.ranges, self.symmetric_activations)

    def is_symmetric(self, bits: int) -> bool:
        """Whether zero points of weights of so many bits are 0."""
        if self.symmetric is None:
            return self.activations is not None or self.dynamic or bits >= 8
        return self.symmetric

    def scheme(self, name: str, fixed: bool, bits: int | None = None) -> Scheme:
        """How a weight becomes integers; ``fixed`` where an integer operator reads them; ``bits`` in place of its own."""
        bits = min(self.bits_of(name), 16 if fixed else 8) if bits is None else bits
        return Scheme(
            bits,
            self.weight_rule,
            None if fixed else self.group,
            self.per_tensor,
            self.is_symmetric(bits),
            self.rounding,
            self.saturation_free and fixed,
        )


def together(notes: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """(layer, what there is to say of it), one sentence for all layers of which the same is said."""
    names: dict[str, list[str]] = {}
    for name, text in notes:
        names.setdefault(text, []).append(name)
    return tuple(f"{', '.join(found)}: {text}" for text, found in names.items())
