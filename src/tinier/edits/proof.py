"""The proof that a network is what its plan says: equal to the masked reference, which knows nothing of how parameters are cut."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from tinier.edits.rewrite import Kept
from tinier.errors import RefusedError
from tinier.graph.axes import Axis, atoms, positions
from tinier.graph.groups import Channels
from tinier.graph.masked import masked_outputs, masked_values
from tinier.graph.single import HALF, is_half, recast, recast_inputs, recast_traced, single
from tinier.graph.states import repeatable
from tinier.graph.trace import Traced, isolated, leaves
from tinier.network import Network

TOLERANCE = 1e-5
ROUNDING = 1e-3  # a difference above this is none of rounding
EXACT = 1e-10  # what rounding leaves in float64
NOT_PROVED = (
    "it is on the meta device, where nothing can be run: the smaller network was not proved equal to the masked reference; "
    "apply the plan to the network with its weights for that"
)


@dataclass(frozen=True, eq=False)
class Reference:
    """The masked reference of one cut on random inputs, run when first asked for.

    Attributes:
        original: the network before the cut.
        channels: axes of its graph.
        kept: atom → (kept,) int64 positions that stay.
        seed: of the random inputs.
    """

    original: Network
    channels: Channels
    kept: Kept
    seed: int

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Input name → random tensor, of batch 3 where the batch is free."""
        return random_inputs(self.original, self.seed)

    @cached_property
    def half(self) -> bool:
        """Whether the network computes in half precision, where nothing is equal to 1e-5."""
        return is_half(self.original.traced.module, self.inputs)

    @cached_property
    def wanted(self) -> tuple[Tensor, ...]:
        """The outputs that the smaller network must have."""
        with repeatable():
            return masked_outputs(self.original.traced, self.channels, self.kept, self.inputs)

    @cached_property
    def finite(self) -> bool:
        """Whether the outputs are numbers, so that comparing them says something."""
        return all(bool(out.isfinite().any()) for out in self.wanted if out.numel())

    def gap(self, network: Network) -> float:
        """The difference of a smaller network to the reference, relative to the largest output; infinity for other shapes."""
        with repeatable():
            found = network(self.inputs)
        same = len(found) == len(self.wanted)
        return difference(found, self.wanted) if same else float("inf")

    def prove(self, pruned: Network | fx.GraphModule, graph: fx.GraphModule) -> float:
        """Show that a smaller network equals the reference, in float64 where float32 rounds too much.

        Args:
            pruned: what has to be shown.
            graph: the smaller graph, of which the first operator that differs is named.

        Returns:
            The largest difference relative to the largest output.

        Raises:
            RefusedError: they differ.
        """
        inputs, traced, channels, run = self.inputs, self.original.traced, self.channels, pruned
        if self.half:
            traced, channels = recast_traced(traced, channels, HALF, torch.float32)
            run = single(pruned if isinstance(pruned, fx.GraphModule) else pruned.traced.module)
            graph, inputs = single(graph), recast_inputs(inputs, HALF, torch.float32)
            with repeatable():
                wanted = masked_outputs(traced, channels, self.kept, inputs)
        else:
            wanted = self.wanted
        try:
            with torch.no_grad(), repeatable():
                found = run(inputs) if isinstance(run, Network) else leaves(isolated(run, inputs))
            gap = difference(found, wanted)
        except (RuntimeError, IndexError, ValueError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RefusedError(
                f"{self.original.name}: the pruned network does not run: {first}"
            ) from error
        if TOLERANCE < gap <= ROUNDING:
            # Deep networks round that much in float32. What is rounding vanishes in float64, and what is wrong stays.
            single_type, double = (torch.float32,), torch.float64
            module = run.traced.module if isinstance(run, Network) else run
            with torch.no_grad(), repeatable():
                wide = recast_inputs(inputs, single_type, double)
                exact = leaves(isolated(recast(module, single_type, double), wide))
            with repeatable():
                reference = masked_outputs(
                    *recast_traced(traced, channels, single_type, double), self.kept, wide
                )
            if difference(exact, reference) <= EXACT:
                return gap
        if gap > TOLERANCE:
            where = _first_difference(traced, graph, channels, self.kept, inputs)
            raise RefusedError(
                f"{self.original.name}: the pruned network differs from the masked reference by {gap:.1e} (relative); {where}"
            )
        return gap


def traced_right(network: Network) -> bool:
    """Whether the traced graph computes what the module does."""
    inputs = random_inputs(network, seed=2)
    with torch.no_grad(), repeatable():
        wanted = network(inputs)
    with torch.no_grad(), repeatable():
        found = leaves(isolated(network.traced.module, inputs))
    return len(found) == len(wanted) and difference(found, wanted) <= TOLERANCE


def on_meta(network: Network) -> bool:
    """Whether parameters or inputs have no values (torch.device("meta"))."""
    return any(t.is_meta for t in (*network.module.parameters(), *network.example.values()))


def random_inputs(network: Network, seed: int) -> dict[str, Tensor]:
    """Inputs like the example: normal as it is, or drawn from the integers in which its rows differ; batch 3 where it is free."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in (
        network.batch(3).items() if network.traced.batched else network.example.items()
    ):
        if tensor.is_floating_point():
            deviation = tensor.float().std() if tensor.numel() > 1 else torch.tensor(0.0)
            if tensor.min() >= 0 and deviation > 0:
                # Of what is never negative a root or a logarithm may be taken: other values of the example's.
                chosen = torch.randint(tensor.numel(), tensor.shape, generator=generator)
                result[name] = tensor.flatten()[chosen.to(tensor.device)]
                continue
            if not deviation > 0:  # an example of zeros or ones would prove nothing
                deviation = torch.tensor(1.0)
            noise = (
                torch.randn(tensor.shape, generator=generator).to(tensor.device) * deviation
                + tensor.float().mean()
            )
            result[name] = noise.to(tensor)
        elif tensor.dtype == torch.bool or tensor.max() <= 1:  # masks and types
            result[name] = tensor
        else:
            # Where all rows agree, a token may have a meaning of its own, as the placeholders of an image.
            fixed = (tensor == tensor[:1]).all(0, keepdim=True).expand(tensor.shape)
            pool = tensor[~fixed] if not bool(fixed.all()) else tensor.flatten()[:0]
            chosen = torch.randint(max(len(pool), 1), tensor.shape, generator=generator)
            drawn = pool[chosen.to(tensor.device)] if len(pool) else tensor
            result[name] = torch.where(fixed, tensor, drawn)
    return result


def difference(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """The largest difference relative to the largest value; infinity for other shapes or NaN in one alone."""
    largest = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.is_meta:
            continue
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        same = a == b
        scale = b.double().nan_to_num(0, 0, 0).abs().max().clamp(min=1e-6) if b.numel() else 1
        gap = torch.where(same | a.isnan(), 0.0, (a.double() - b.double()).abs() / scale)
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    return largest


def left(axis: Axis, kept: Kept) -> Tensor:
    return positions(axis, lambda atom: kept[atom] if atom in kept else torch.arange(atom.size))


def _first_difference(
    traced: Traced,
    graph: fx.GraphModule,
    channels: Channels,
    kept: Kept,
    inputs: Mapping[str, Tensor],
) -> str:
    """The first operator whose sliced result is not the kept part of the masked one."""
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    interpreter.env = {}
    pairs = zip(graph.graph.nodes, masked_values(traced, channels, kept, inputs), strict=True)
    with torch.no_grad():
        for node, (original, masked) in pairs:
            if node.op == "placeholder":
                interpreter.env[node] = inputs[str(node.target)].clone()
                continue
            if "empty" in str(node.target):  # whatever was in memory, filled later on
                interpreter.env[node] = interpreter.run_node(node)
                continue
            try:
                interpreter.env[node] = found = interpreter.run_node(node)
            except RuntimeError as error:
                return f"first at {original.name} ({original.target}): {error}"
            axes = channels.axes.get(original)
            # Integers may be positions, which are numbered anew.
            if (
                isinstance(masked, Tensor)
                and isinstance(axes, list)
                and (masked.is_floating_point() or masked.is_complex())
            ):
                for dim, axis in enumerate(axes):
                    if any(atom in kept for atom in atoms(axis)):
                        stays = left(axis, kept)
                        if masked.shape[dim] != original.meta["val"].shape[dim]:
                            break
                        masked = masked.index_select(dim, stays.to(masked.device))
                else:
                    if difference([found], [masked]) > TOLERANCE:
                        return f"first at {original.name} ({original.target})"
    return "though no operator of the traced graph does: the class computes something else"
