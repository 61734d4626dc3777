"""PyTorch itself: the traced graph as a .pt2 archive (torch.export), read back without unpickling anything."""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tinier.errors import InputError, RefusedError
from tinier.graph.trace import quiet
from tinier.network import Network
from tinier.targets.base import (
    Artifact,
    Input,
    Session,
    Target,
    as_arrays,
    damaged,
    invented,
    is_quantized,
    readable,
)

KIND = "a torch.export archive (.pt2)"

# torch.export.load trusts its file: it unpickles what the archive marks as pickled, evaluates the expressions of symbolic
# shapes and looks up operators by dotted name from the torch package. So only what tinier itself writes may pass: raw
# tensors, ATen operators, arithmetic on sizes. (Guards are code too, but are not evaluated with check_guards=False.)
MEMBERS = re.compile(
    r"(\.data/.*|\.format_version|\.storage_alignment|byteorder|version|archive_format|archive_version"
    r"|data/weights/(weight_\d+|\w+_weights_config\.json)"
    r"|data/constants/(tensor_\d+|\w+_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json)"
)
OPERATORS = re.compile(
    r"torch\.ops\.(aten|higher_order)\.(?!(from_file|save|warn)\b)\w+(\.\w+)?|torch\.sym_\w+|math\.(ceil|floor|trunc)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
SHAPE_SYMBOL = re.compile(r"Symbol\('[su]\d+'(, (positive|nonnegative|integer)=(True|False))*\)")
SHAPE_WORD = re.compile(
    "Integer|Rational|Add|Mul|Pow|Mod|PythonMod|FloorDiv|CleanDiv|Min|Max|oo|int_oo|ToFloat|IntTrueDiv|FloorToInt|CeilToInt"
    "|TruncToInt|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Equality|Unequality|StrictLessThan|StrictGreaterThan|LessThan|GreaterThan"
    "|evaluate|True|False"
)
SHAPE_EXPRESSION = re.compile(r"[\w\s()+\-*/,<>=&|~]*")


class Torch(Target):
    """``model.pt2``: float networks, run eagerly from the exported graph."""

    name: ClassVar[str] = "torch"
    package: ClassVar[str] = "torch"
    extra: ClassVar[str] = ""
    suffix: ClassVar[str] = ".pt2"

    def refuses(self, network: Network) -> str | None:
        if is_quantized(network):
            return (
                "torch runs quantize/dequantize pairs as float arithmetic: "
                "slower than the float network, and no smaller in memory"
            )
        return None

    def lower(self, network: Network, folder: Path, onnx_file: Path | None = None) -> Artifact:
        if reason := self.refuses(network):
            raise RefusedError(f"torch cannot take {network.name}: {reason}")
        file = folder / "model.pt2"
        with quiet():
            torch.export.save(_bare(network), file)
        return Artifact.of(self.name, file)

    def open(self, file: Path, threads: int) -> Session:
        return TorchSession(readable(file, KIND), threads)

    def usage(self, artifact: Artifact, network: Network) -> str:
        inputs = re.sub(
            r"np\.ones\((.*?), dtype=\"(\w+)\"\)",
            r"torch.ones(\1, dtype=torch.\2)",
            invented(network),
        )
        return "\n".join(
            [
                "import torch",
                f'model = torch.export.load("{artifact.files[0].name}").module()',
                f"print(model(**{inputs}))",
            ]
        )


class TorchSession(Session):
    """The graph of an archive, in inference mode."""

    def __init__(self, file: Path, threads: int) -> None:
        check_archive(file)
        try:
            with quiet():
                exported = torch.export.load(file)
                module = exported.module(check_guards=False)
        # Damage shows in many forms; torch has no common base for them.
        except Exception as error:
            raise damaged(file, KIND, error) from error
        self.threads = threads
        self.inputs = tuple(_declared(exported))
        # The bare graph costs what the model itself costs; torch.export's checks of each call, which the lines of `usage`
        # have, would add 0.1 ms and make small models look slow.
        module.graph.set_codegen(fx.graph.CodeGen())
        self._module = fx.GraphModule(module, module.graph)

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        # The number of threads belongs to the process, so each run sets its own.
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                outputs = self._module(*[_tensor(inputs[port.name]) for port in self.inputs])
        finally:
            if before != self.threads:
                torch.set_num_threads(before)
        leaves = pytree.tree_leaves(outputs)
        return as_arrays(leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor))


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _bare(network: Network) -> ExportedProgram:
    """The exported program without the user's data, source lines and paths: they do not belong in an artifact."""
    exported = network.traced.exported
    (output,) = exported.graph.find_nodes(op="output")
    bare = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = bare.graph_copy(exported.graph, copies)
    copies[output] = bare.output(result)
    for old, new in copies.items():
        # Copying renames what is called like a Python builtin, such as "input"; the signature has the names as they were.
        new.name = old.name
        new.meta = {key: value for key, value in old.meta.items() if key == "val"}
    # Outputs become a plain tuple: a model's own output class would have to be imported before the file could be read.
    (entry,) = (entry for entry in exported.module_call_graph if not entry.fqn)
    assert entry.signature is not None
    flat = pytree.tree_structure(tuple(pytree.tree_leaves(output.args[0])))
    entry = replace(entry, signature=replace(entry.signature, out_spec=flat))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in network.example.items()}
    return ExportedProgram(
        root=exported.graph_module,
        graph=bare,
        graph_signature=exported.graph_signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=[entry],
        example_inputs=((), zeros),
        constants=exported.constants,
    )


def _declared(exported: ExportedProgram) -> Iterator[Input]:
    _, named = exported.example_inputs or ((), {})
    values = {
        node.name: node.meta["val"]
        for node in exported.graph.find_nodes(op="placeholder")
        if node.name in exported.graph_signature.user_inputs
    }
    for name, value in zip(named, values.values(), strict=True):
        shape = tuple(n if isinstance(n, int) else None for n in value.shape)
        yield Input(name, shape, np.dtype(str(value.dtype).removeprefix("torch.")))


def check_archive(file: Path) -> None:
    """Refuse archives that could make torch.export.load run code.

    Raises:
        InputError: not an archive of torch.export, or one with pickles, code or foreign operators; the message says which.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = {name.split("/", 1)[-1]: name for name in archive.namelist()}
            if len(members) != len(archive.namelist()):  # readers differ in which of two they take
                raise InputError(_unsafe(file, "two members of one name"))
            for short in members:
                if not MEMBERS.fullmatch(short):
                    raise InputError(_unsafe(file, f"the member {short}"))
            texts = {
                short: json.loads(archive.read(name))
                for short, name in members.items()
                if short.endswith(".json")
            }
            if "models/model.json" not in texts:
                raise InputError(f"{file} is not {KIND}: it has no models/model.json")
            with archive.open(members["data/sample_inputs/model.pt"]) as sample:
                torch.load(sample, weights_only=True)
    except (zipfile.BadZipFile, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise damaged(file, KIND, error) from error
    except Exception as error:  # UnpicklingError, from torch.load: not only tensors
        raise InputError(_unsafe(file, "pickled objects")) from error
    for text in texts.values():
        for key, value in _entries(text):
            if key == "use_pickle" and value:
                raise InputError(_unsafe(file, "pickled tensors"))
            if key == "target" and not (isinstance(value, str) and OPERATORS.fullmatch(value)):
                raise InputError(_unsafe(file, f"the operator {value}"))
            if key == "expr_str" and not _is_arithmetic(value):
                raise InputError(_unsafe(file, f"the size {value}"))


def _unsafe(file: Path, what: str) -> str:
    return (
        f"{file} holds {what}, and tinier opens only archives of plain tensors and ATen operators; "
        "export the model again, or use its ONNX file"
    )


def _is_arithmetic(expression: object) -> bool:
    if not isinstance(expression, str):
        return False
    rest = SHAPE_SYMBOL.sub("1", expression)
    words = re.findall(r"[^\W\d]\w*", rest)
    return SHAPE_EXPRESSION.fullmatch(rest) is not None and all(map(SHAPE_WORD.fullmatch, words))


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of every object in a JSON value, with what it holds."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)
