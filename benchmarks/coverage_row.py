"""One row of the coverage table: an architecture pruned to half its MACs, and everything that must still hold then."""

import copy
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from architectures import table
from architectures.base import Architecture, make
from torch import Tensor, nn

import tinier
from tinier.edits.base import Plan
from tinier.edits.proof import random_inputs
from tinier.edits.slice import Slice
from tinier.graph.axes import Atom
from tinier.graph.groups import Channels, channel_groups
from tinier.graph.macs import macs
from tinier.graph.masked import masked_outputs
from tinier.graph.single import recast, recast_inputs, recast_traced
from tinier.graph.states import evaluating, repeatable
from tinier.graph.trace import call, isolated, leaves
from tinier.methods.channel_pruning import ChannelPruning
from tinier.network import Network, name_inputs
from tinier.sources.load import load
from tinier.targets.onnx_file import write_onnx
from tinier.verbs import Smaller

KEEP = 0.5
TOLERANCE = 1e-5  # of the pruned network to the masked reference, relative to the largest output
EXACT = 1e-10  # in float64, where float32 rounds more than that itself
RUNTIME_TOLERANCE = 1e-4  # of ONNX Runtime's fused kernels to torch
FEW, MORE = 3, 5  # batch sizes
LONGER = 3  # positions more than in the example


def run(name: str, answer: Path) -> None:
    """Fill a row and write it as JSON after every step, so that a killed row says how far it came."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"name": name}
    steps: list[tuple[str, Callable[[], None]]] = []
    work = _Row(table()[0][name], row)
    steps = [
        ("build", work.build),
        ("trace", work.trace),
        ("analyse", work.analyse),
        ("prune", work.prune),
        ("equal", work.compare),
        ("batch", work.other_batch),
        ("length", work.other_length),
        ("trains", work.train),
        ("onnx", work.onnx),
        ("saved", work.save),
    ]
    for step, action in steps:
        row["step"] = step
        _write(answer, row)
        try:
            action()
        except (
            Exception
        ) as error:  # whatever a model, an exporter or the engine raises is this row's result
            row.setdefault("failed", {})[step] = f"{type(error).__name__}: {_first(error)}"
            if step in ("build", "trace", "analyse", "prune"):
                break
    row["step"] = "done"
    _write(answer, row)


class _Row:
    def __init__(self, architecture: Architecture, row: dict[str, Any]) -> None:
        self.architecture, self.row = architecture, row
        self.network: Network
        self.pruned: Network
        self.channels: Channels
        self.plan: Plan

    def build(self) -> None:
        model, example = make(self.architecture)
        if isinstance(model, nn.Module) and example is not None:
            self.network = Network(
                model, name_inputs(model, example)
            )  # traced when first asked for
        else:
            self.network = load(model, example)
        self.row["parameters"] = sum(p.numel() for p in self.network.module.parameters())

    def trace(self) -> None:
        start = time.perf_counter()
        traced = self.network.traced
        self.row["trace_ms"] = 1000 * (time.perf_counter() - start)
        self.row["operators"] = len(traced.module.graph.nodes)

    def analyse(self) -> None:
        start = time.perf_counter()
        self.channels = channel_groups(self.network.traced)
        self.row["axes_ms"] = 1000 * (time.perf_counter() - start)
        self.row["groups"] = len(self.channels.groups)
        unknown = {
            why.operator
            for pinned in self.channels.pins
            for why in pinned.pins
            if "propagation rule" in why.reason
        }
        self.row["without_rule"] = sorted(unknown)

    def prune(self) -> None:
        start = time.perf_counter()
        self.plan = ChannelPruning(keep=KEEP).plan(self.network)
        self.pruned = self.plan.apply(self.network)
        self.row["rest_ms"] = 1000 * (time.perf_counter() - start)
        self.row["class"] = type(self.pruned.module) is type(self.network.module)
        before, after = (sum(macs(n.traced).values()) for n in (self.network, self.pruned))
        self.row["macs"], self.row["macs_left"] = before, after / before

    def _difference(self, inputs: Mapping[str, Tensor]) -> float:
        """Of the pruned network to the masked reference, relative to the largest value of each output."""
        network, channels = self.network, self.channels
        if not _fits(
            network, inputs
        ):  # a loop over the length was unrolled: the reference is traced anew
            network = Network(network.module, dict(inputs))
            channels = channel_groups(network.traced)
        with repeatable():
            wanted = masked_outputs(network.traced, channels, self._kept(channels), inputs)
        with repeatable():
            return difference(self.pruned(inputs), wanted)

    def _kept(self, channels: Channels) -> dict[Atom, Tensor]:
        kept = {}
        for edit in self.plan.edits:
            assert isinstance(edit, Slice)
            group = channels.group(edit.group)
            assert group is not None
            kept[group.atom] = torch.tensor(edit.kept)
        return kept

    def _exactly(self, inputs: Mapping[str, Tensor]) -> tuple[float, float]:
        """In float64: the difference to the masked reference, and to the pruned network itself in float32, which is its rounding."""
        wide = recast_inputs(inputs, (torch.float32,), torch.float64)
        traced, channels = recast_traced(
            self.network.traced, self.channels, (torch.float32,), torch.float64
        )
        with repeatable():
            wanted = masked_outputs(traced, channels, self._kept(channels), wide)
        module = recast(self.pruned.traced.module, (torch.float32,), torch.float64)
        with torch.no_grad(), repeatable():
            found = leaves(isolated(module, wide))
        with torch.no_grad(), repeatable():
            rounded = leaves(isolated(self.pruned.traced.module, inputs))
        return difference(found, wanted), difference(rounded, found)

    def _equal(self, inputs: Mapping[str, Tensor]) -> float:
        gap = self._difference(inputs)
        if not gap <= TOLERANCE:
            exact, rounding = self._exactly(inputs)
            self.row["exact"] = max(self.row.get("exact", 0.0), exact)
            self.row["rounding"] = max(self.row.get("rounding", 0.0), rounding)
            if not exact <= EXACT:
                raise ValueError(
                    f"differs from the masked reference by {gap:.1e}, in float64 by {exact:.1e}"
                )
        return gap

    def compare(self) -> None:
        self.row["difference"] = self._equal(random_inputs(self.network, seed=7))

    def other_batch(self) -> None:
        self._other(self.architecture.batched, resized(self.network.example, FEW, {}))
        self._other(self.architecture.batched, resized(self.network.example, MORE, {}))
        self.row["batch"] = True if self.architecture.batched else None

    def other_length(self) -> None:
        lengths = self.architecture.lengths
        if lengths is None:
            lengths = {
                name: (1,)
                for name, tensor in self.network.example.items()
                if tensor.ndim > 1 and not tensor.is_floating_point()
            }
        if not lengths:
            self.row["length"] = None
            return
        inputs = resized(self.network.example, FEW if self.architecture.batched else 0, lengths)
        try:
            self.network(inputs)
        except Exception:  # the user's code refuses another length: nothing to keep free
            self.row["length"] = None
            return
        self._other(True, inputs)
        self.row["length"] = True

    def _other(self, possible: bool, inputs: Mapping[str, Tensor]) -> None:
        if possible:
            self._equal(inputs)

    def train(self) -> None:
        module = copy.deepcopy(self.pruned.module)
        before = _loss(module, self.pruned.example)
        module.train()
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        loss = _error(call(module, self.pruned.example))
        loss.backward()
        # A step of the same length for all: some losses are so flat that a fixed rate changes nothing in float32.
        norm = float(
            torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        )
        optimizer.param_groups[0]["lr"] = 1e-2 / max(norm, 1e-12)
        optimizer.step()
        after = _loss(module, self.pruned.example)
        if not (
            torch.tensor([before, float(loss.detach()), after]).isfinite().all() and after != before
        ):
            raise ValueError(f"loss {before} before and {after} after one step")
        self.row["trains"] = True

    def onnx(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            try:
                write_onnx(self.pruned, path)
            except Exception as error:
                try:
                    write_onnx(self.network, path)
                except Exception:
                    raise ValueError(
                        f"the original cannot be exported either: {_first(error)}"
                    ) from error
                raise
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            self.row["onnx_difference"] = 0.0
            batches = [self.pruned.example]
            if self.pruned.traced.batched:
                batches.append(resized(self.pruned.example, MORE, {}))
            for inputs in batches:
                names = {item.name for item in session.get_inputs()}
                arrays = {name: inputs[name].numpy() for name in names}
                found = tuple(torch.as_tensor(value) for value in session.run(None, arrays))
                gap = difference(found, self.pruned(inputs))
                self.row["onnx_difference"] = max(self.row["onnx_difference"], gap)
        if not self.row["onnx_difference"] <= RUNTIME_TOLERANCE:
            raise ValueError(f"ONNX Runtime differs by {self.row['onnx_difference']:.1e}")
        self.row["onnx"] = True

    def save(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "saved"
            tinier.save(Smaller(self.pruned, self.network, self.plan), folder)
            model, example = make(self.architecture)
            loaded = tinier.load(folder, into=model, example=example)
            with repeatable():
                found = loaded.network(self.pruned.example)
            with repeatable():
                gap = difference(found, self.pruned(self.pruned.example))
        if gap:
            raise ValueError(f"the loaded network differs by {gap:.1e}")
        self.row["saved"] = True


def _fits(network: Network, inputs: Mapping[str, Tensor]) -> bool:
    """Whether the traced graph takes inputs of these sizes: those that differ from the example's are free in it."""
    for node in network.traced.module.graph.find_nodes(op="placeholder"):
        for size, length in zip(node.meta["val"].shape, inputs[node.target].shape, strict=True):
            fixed = isinstance(size, int) or size.node.maybe_as_int() is not None
            if fixed and int(size) != length:
                return False
    return True


def difference(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest difference of an output relative to its largest value; infinity where shapes or NaN differ."""
    if len(found) != len(wanted):
        return float("inf")
    largest = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        if not a.numel():
            continue
        x, y = (value.detach().to(torch.complex128).nan_to_num(0) for value in (a, b))
        infinite = y.abs().isinf()
        gap = torch.where(x == y, 0.0, (x - y).abs())
        scale = torch.where(infinite, 0.0, y.abs()).max().clamp(min=1e-6)
        largest = max(largest, float((gap / scale).max()))
    return largest


def resized(
    example: Mapping[str, Tensor], batch: int, lengths: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The example at another batch size (0: its own), some dimensions longer: rows and positions again, floats anew."""
    generator = torch.Generator().manual_seed(batch)
    result = {}
    for name, tensor in example.items():
        if batch and tensor.ndim:
            rows = torch.arange(batch) % len(tensor)
            tensor = tensor[rows]
        for dim in lengths.get(name, ()):
            size = tensor.shape[dim]
            order = [*range(size), *(size - 1 - i % size for i in range(LONGER))]
            tensor = tensor.index_select(dim, torch.tensor(order))
        if tensor.is_floating_point() and tensor.unique().numel() > 2:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor = tensor + 0.1 * float(tensor.std()) * noise.to(tensor.dtype)
        result[name] = tensor
    return result


def _error(outputs: tuple[Tensor, ...]) -> Tensor:
    """Mean squared distance of all float outputs to fixed random targets."""
    generator = torch.Generator().manual_seed(3)
    losses = [
        (out - torch.randn(out.shape, generator=generator)).square().mean()
        for out in outputs
        if out.is_floating_point() and out.requires_grad
    ]
    if not losses:
        raise ValueError("no output depends on a parameter")
    return torch.stack(losses).sum()


def _loss(module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    with evaluating(module):
        return float(_error(call(module, inputs)).detach())


def _first(error: BaseException) -> str:
    """The first two lines of a message; files are named from where they are installed, as this goes into a file of the repository."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    root = str(Path(__file__).resolve().parent.parent) + os.sep
    text = re.sub(r"\S*[/\\]site-packages[/\\]", "", " ".join(lines[:2]))
    return text.replace(root, "")[:300]


def _write(path: Path, row: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(row))
    partial.replace(path)
