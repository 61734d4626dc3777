"""Mixed precision for ``quantize``: bits of each layer within a size, float layers within a time."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, fx

from tinier.edits.base import Plan
from tinier.errors import InputError, RefusedError
from tinier.graph.fold import fold, read
from tinier.graph.stored import stored
from tinier.graph.walk import outputs_of
from tinier.measure.attribution import outputs_loss, restored_losses
from tinier.methods.base import covers
from tinier.methods.quantization import Quantization
from tinier.methods.sampled import examples, spread
from tinier.methods.weight_integers import Known
from tinier.network import Network
from tinier.search.bit_allocation import FLOAT, KINDS, allocate, packed_bytes, sensitivities
from tinier.search.integer_speed import layer_latencies, without_slower
from tinier.statistics import Statistics
from tinier.targets.base import Target
from tinier.units import is_whole, parse_bytes, parse_milliseconds

FEW = 32  # examples that sensitivities are measured on
TRIES = 4  # files that are written to find one that fits
RANKED = 16  # examples by which layers are put in order before they are left float
ALONE, INTEGER = (2, 3, 4, 6, 8), (4, 8)


@dataclass(frozen=True)
class Mixture:
    """What was asked of the bits of single layers.

    Attributes:
        max_size: bytes of the packed weights.
        max_latency: milliseconds of the artifact.
        choices: bits, 0 for float.
        sensitivity: a kind of `sensitivities`.
    """

    max_size: int | None
    max_latency: float | None
    choices: tuple[int, ...]
    sensitivity: str

    @classmethod
    def of(
        cls,
        max_size: float | str | None,
        max_latency: float | str | None,
        choices: Sequence[int] | None,
        sensitivity: str,
        method: Quantization,
    ) -> "Mixture":
        """The arguments of ``quantize``.

        Raises:
            InputError: two limits, an unknown kind, or bits out of range.
        """
        if max_size is not None and max_latency is not None:
            raise InputError("max_size and max_latency: give one limit and leave out the other")
        if sensitivity not in KINDS:
            raise InputError(f"sensitivity={sensitivity!r}: {', '.join(KINDS)} are known")
        if choices is not None and max_size is None:
            raise InputError(
                "choices: these are bits to choose from within a max_size; give that, too"
            )
        found = choices or (ALONE if method.activations is None else INTEGER)
        if all(bits == FLOAT for bits in found):
            raise InputError(f"choices={tuple(found)}: at least one number of bits is needed")
        for bits in found:
            if not is_whole(bits) or (bits != FLOAT and not 2 <= bits <= 8):
                raise InputError(
                    f"choices={tuple(found)}: 2 to 8 bits, or 0 for float, are possible"
                )
        size = None if max_size is None else parse_bytes(max_size, "max_size")
        limit = None if max_latency is None else parse_milliseconds(max_latency)
        return cls(size, limit, tuple(found), sensitivity)

    @property
    def needs(self) -> frozenset[str]:
        """What of ``observe`` the sensitivities need."""
        fisher = self.sensitivity == "fisher" and (self.max_size or self.max_latency)
        return frozenset({"squares"} if fisher else ())

    def small(
        self,
        network: Network,
        method: Quantization,
        statistics: Statistics | None,
        batches: Sequence[dict[str, Tensor]],
        target: Target | None = None,
    ) -> tuple[Quantization, tuple[str, ...]]:
        """The method with bits for each layer within ``max_size``: of the weights without gaps, or of the file for ``target``.

        Raises:
            InputError: every layer's bits are given.
            RefusedError: nothing fits, or the float weights do.

        Cost:
            The sensitivities; with a target two to four exports.
        """
        assert self.max_size is not None
        container = int if target is None else target.precision.container
        cost = packed_bytes(network, method, (*self.choices, *range(2, 17)), container)
        patterns = [pattern for pattern, _ in method.layers]
        if all(covers(patterns, name) for name in cost):
            raise InputError(
                f"layers={dict(method.layers)} and max_size: every layer has its bits, and none are left to choose; "
                "leave one of the two out, or give bits to fewer layers"
            )
        few = spread(network, batches, FEW)
        loss = sensitivities(network, method, few, self.choices, statistics, self.sensitivity)
        free = {name: row for name, row in loss.items() if not covers(patterns, name)}
        module = fold(network.traced.module)

        def written(bits: dict[str, int]) -> float:
            mixed = replace(method, layers=(*method.layers, *bits.items()))
            with tempfile.TemporaryDirectory(prefix="tinier-") as folder:
                made = mixed.decide(network, statistics)[0].apply(network)
                assert target is not None
                return target.lower(made, Path(folder)).size

        if target is None:
            others = sum(cost[name][method.bits_of(name)] for name in loss if name not in free)
            others += sum(4 * _count(read(module, n)) for n in stored(module) if n not in loss)
        else:
            most = max(bits for bits in self.choices if bits)
            others = written(dict.fromkeys(free, most)) - sum(cost[name][most] for name in free)
        if others > self.max_size:
            what = "the layers whose bits are given and those that stay float take"
            if target is not None:
                what = f"all but the weights that bits are chosen for take, in the file for {target.name},"
            raise RefusedError(
                f"max_size: {self.max_size:,} bytes were asked for; {what} {others:,.0f}"
            )
        for _ in range(TRIES):
            chosen = allocate(free, {n: cost[n] for n in free}, self.max_size - others)
            if set(chosen.values()) == {FLOAT} and len(free) == len(loss):
                raise RefusedError(
                    f"max_size: the float weights fit {self.max_size:,} bytes; nothing needs to be quantized"
                )
            taken = others + sum(cost[name][bits] for name, bits in chosen.items())
            if target is None:
                break
            # What the file has beside integers and scales, as names and operators, depends a little on the bits.
            expected, taken = taken, written(chosen)
            if taken <= self.max_size:
                break
            others += max(taken - expected, 1)
        else:
            assert target is not None
            raise RefusedError(
                f"max_size: the file for {target.name} takes {taken:,.0f} bytes where {self.max_size:,} were asked for; "
                "ask for a little more, or less of the network"
            )
        counts = ", ".join(
            f"{sum(b == bits for b in chosen.values())} layers at {bits or 32} bits"
            for bits in sorted(set(chosen.values()))
        )
        where = "bytes, packed" if target is None else f"bytes, the file for {target.name}"
        note = f"weights in {taken:,.0f} {where}: {counts}"
        return replace(method, layers=(*method.layers, *chosen.items())), (note,)

    def fast(
        self,
        network: Network,
        method: Quantization,
        statistics: Statistics,
        batches: Sequence[dict[str, Tensor]],
        target: Target,
        threads: int,
    ) -> tuple[Quantization, tuple[str, ...]]:
        """The method with layers left float: those that are slower in integers, or as many as ``max_latency`` allows."""
        if self.max_latency is None:
            return without_slower(network, method, statistics, target, threads)
        times = layer_latencies(network, method, statistics, target, threads)
        few = spread(network, batches, FEW)
        bits = {name: method.bits_of(name) for name in times}
        choices = (FLOAT, *sorted(set(bits.values())))
        loss = sensitivities(network, method, few, choices, statistics, self.sensitivity)
        both = {n: {FLOAT: 0.0, bits[n]: loss[n][bits[n]]} for n in times if n in loss}
        cost = {name: times[name] for name in both}
        try:
            chosen = allocate(both, cost, self.max_latency)
        except RefusedError as error:
            raise RefusedError(f"max_latency in ms on {target.name}: {error}") from error
        left = tuple(name for name, bits in chosen.items() if bits == FLOAT)
        if len(left) == len(chosen):
            whole = sum(row[FLOAT] for row in cost.values())
            raise RefusedError(
                f"the float layers take {whole:.3g} ms on {target.name}, and {self.max_latency:g} ms was asked for: "
                "nothing needs to be quantized; leave max_latency out to quantize all the same"
            )
        note = (
            f"{len(left)} of {len(chosen)} layers stay float within {self.max_latency:g} ms "
            f"by the profile of {target.name}"
        )
        return replace(method, exclude=(*method.exclude, *left)), (note,)


def restored(
    network: Network,
    method: Quantization,
    statistics: Statistics | None,
    batches: Sequence[dict[str, Tensor]],
    share: float,
) -> tuple[Quantization, tuple[str, ...]]:
    """The method with layers left float until at most a share of the loss is left: those first that give back most for each weight.

    Args:
        network: the folded float network.
        method: how the others are quantized.
        statistics: what it needs.
        batches: examples; a few dozen are used.
        share: of the loss of the wholly quantized network, in (0, 1).

    Raises:
        RefusedError: every layer would stay float.

    Cost:
        For each layer a run of 16 examples through what comes after it, and one of 32 for each of about log₂ n choices of n layers.
    """
    few = spread(network, batches, FEW)
    known: Known = {}
    plan, _ = method.decide(network, statistics, known)
    found = restored_losses(network, plan, spread(network, batches, RANKED))
    inputs = examples(network, few, FEW, None)
    wanted = outputs_of(fold(network.traced.module), inputs)

    def loss_of(plan: Plan) -> float:
        quantized = plan.apply(network).module
        assert isinstance(quantized, fx.GraphModule)
        return outputs_loss(outputs_of(quantized, inputs), wanted)

    whole = loss_of(plan)
    if not whole:
        return method, ("restore: quantizing loses nothing, so that nothing stays float",)
    module = fold(network.traced.module)
    stores = {store.name: store for store in method.stores(network)}
    sizes = {name: _count(read(module, name)) for name in stores}
    # What one operator reads, as the weights of a recurrent layer, stays float together.
    names = {
        name.removesuffix(".weight"): tuple(
            other for other, one in stores.items() if set(one.readers) & set(store.readers)
        )
        for name, store in stores.items()
    }
    rows = [layer for layer, gain in found.items() if layer in names and gain > 0]
    rows.sort(key=lambda layer: -found[layer] / max(sum(sizes[n] for n in names[layer]), 1))

    def left(count: int) -> tuple[Quantization, float]:
        stay = tuple(dict.fromkeys(name for layer in rows[:count] for name in names[layer]))
        trial = replace(method, exclude=(*method.exclude, *stay))
        if len(stay) >= len(sizes):
            return trial, 0.0
        return trial, loss_of(trial.decide(network, statistics, known)[0])

    low, high = 0, 1
    while high < len(rows) and left(high)[1] > share * whole:
        low, high = high, 2 * high
    high = min(high, len(rows))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle)[1] <= share * whole else (middle, high)
    trial, loss = left(high)
    if loss == 0.0 or loss > share * whole:
        raise RefusedError(
            f"restore={share:g}: every layer would stay float, or {loss / max(whole, 1e-300):.0%} of the loss is left; "
            "a larger share, or more bits, is needed"
        )
    said = ", ".join(rows[:high])
    note = f"float, because it gives back most: {said}; {loss / max(whole, 1e-300):.0%} of the loss is left"
    return trial, (note,)


def _count(weight: Tensor | None) -> int:
    return 0 if weight is None else weight.numel()
