"""A traced network as a .pt2 archive of torch.export, which needs no class, written without what is the user's own and read without
running anything that is in it."""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tinier.errors import InputError
from tinier.graph.states import quiet
from tinier.graph.trace import Traced

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


def write(traced: Traced, example: Mapping[str, Tensor], file: Path) -> None:
    """Write a traced network: its graph, with its free sizes, and its weights. No class, source line or example goes into the file.

    Args:
        traced: the network.
        example: input name → tensor, of which only shapes and types are kept.
        file: to write.
    """
    with quiet():
        torch.export.save(_bare(traced, example), file)


def read(file: Path) -> ExportedProgram:
    """Read an archive that was checked to hold only tensors, ATen operators and arithmetic on sizes.

    Raises:
        InputError: it holds something else, or is damaged.
    """
    check_archive(file)
    try:
        with quiet():
            return torch.export.load(file)
    # Damage shows in many forms; torch has no common base for them.
    except Exception as error:
        raise _damaged(file, error) from error


def _bare(traced: Traced, example: Mapping[str, Tensor]) -> ExportedProgram:
    """The exported program without the user's data, source lines and paths: they do not belong in an artifact."""
    exported = traced.exported
    (output,) = exported.graph.find_nodes(op="output")
    bare = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = bare.graph_copy(exported.graph, copies)
    copies[output] = bare.output(result)
    for old, new in copies.items():
        # Copying renames what is called like a Python builtin, such as "input"; the signature has the names as they were.
        new.name = old.name
        new.meta = {key: value for key, value in old.meta.items() if key == "val"}
    # Outputs become a plain tuple or dict: a model's own output class would have to be imported before the file could be read.
    (entry,) = (entry for entry in exported.module_call_graph if not entry.fqn)
    assert entry.signature is not None
    found = pytree.tree_leaves(output.args[0])
    named = len(found) == len(traced.outputs) and traced.named
    flat = pytree.tree_structure(
        dict(zip(traced.outputs, found, strict=True)) if named else tuple(found)
    )
    entry = replace(entry, signature=replace(entry.signature, out_spec=flat))
    zeros = {name: torch.zeros_like(tensor) for name, tensor in example.items()}
    return ExportedProgram(
        root=exported.graph_module,
        graph=bare,
        graph_signature=exported.graph_signature,
        state_dict=exported.state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=[entry],
        example_inputs=((), zeros),
        constants=exported.constants,
        verifiers=exported.verifiers,  # the graph may write in place, as nn.ReLU(inplace=True) does
    )


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
        raise _damaged(file, error) from error
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


def _damaged(file: Path, error: BaseException) -> InputError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(f"{file} cannot be opened as {KIND}: {' '.join(lines[:2])[:300]}")
