"""The architecture, read from the source text: layers, cycles, hidden imports, file sizes, safe loading, public names.

The rule for imports between the modules of tinier:

- every module belongs to a layer; it may import from any lower layer;
- within a layer, a folder may import its own modules and no other folder or file of the layer, except for ``*.base``
  modules, which hold abstract classes and value types that fields are typed by;
- within a folder whose files are techniques (``FAMILIES``), files import only ``base``, files of the folder that define
  no technique, and what ``DEFAULTS`` lists: the values of default arguments.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tinier

SOURCE = Path(tinier.__file__).parent

# Each layer imports from those before it only.
LAYERS = [
    {"errors"},
    {"registry", "progress", "units", "version", "output"},
    {"tensors"},
    {"graph", "modules"},
    {"network"},
    {"edits", "statistics", "data"},
    {"criteria"},
    {"methods", "recovery", "sources", "targets", "measure"},
    {"search"},
    {"report"},
    {"compress", "inspect", "verbs", "verify"},
    {"shrink"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]

# Folders in which a file is a technique that registers itself.
FAMILIES = {"criteria", "methods", "recovery", "targets"}

# (importer, imported): default values, where one technique is the default of another's argument.
DEFAULTS = {
    ("tinier.criteria.reconstruction", "tinier.criteria.magnitude"),
    ("tinier.methods.channel_pruning", "tinier.criteria.magnitude"),
    ("tinier.methods.weight_pruning", "tinier.criteria.magnitude"),
    ("tinier.recovery.loop", "tinier.recovery.soft_targets"),
    ("tinier.recovery.loop", "tinier.recovery.output_mse"),
}

# Packages that may be absent; only these may be imported inside functions.
OPTIONAL = {
    "PIL",
    "altair",
    "keras",
    "onnx2fx",
    "onnxruntime",
    "onnxscript",  # a dependency, but slow to import
    "openvino",
    "pandas",
    "pyarrow",
    "torchmetrics",
    "transformers",
    "vl_convert",
}

# Measuring memory runs a file of its own in a fresh process that must not load what it does not measure.
FRESH_PROCESS: set[str] = {"tinier.measure.probe"}

MOST_LINES = 400

# The names of DESIGN's public face that exist so far; adding one is a decision, so it is made here too.
PUBLIC: set[str] = {
    "Result",
    "Smaller",
    "TinierError",
    "__version__",
    "compress",
    "deliver",
    "distill",
    "export",
    "factorize",
    "inspect",
    "linearize",
    "load",
    "measure",
    "pack",
    "prune",
    "quantize",
    "recover",
    "save",
    "share",
    "shrink",
    "sparsify",
    "unpack",
    "verify",
}


def modules() -> dict[str, Path]:
    """Name of each module of tinier → its file."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def targets(name: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Absolute names of what an import statement imports: modules where they are tinier's, else packages."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    base = node.module or ""
    if node.level:
        parts = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parts, base] if base else parts)
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in MODULES else base


def imports(name: str) -> list[tuple[ast.Import | ast.ImportFrom, str]]:
    """Every import of a module, at its top or not."""
    return [
        (node, target)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in targets(name, node)
    ]


def inner(name: str) -> list[str]:
    return [target for _, target in imports(name) if target.split(".")[0] == "tinier"]


def house(name: str) -> str:
    """The folder or file directly under ``tinier`` that a module belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def layer(name: str) -> int:
    for number, members in enumerate(LAYERS):
        if house(name) in members:
            return number
    pytest.fail(f"{name}: {house(name)} is in no layer; add it to LAYERS where it belongs")


def is_base(name: str) -> bool:
    return name.endswith(".base")


def has_technique(name: str) -> bool:
    """Whether a module defines a class with a class attribute ``name`` that has a value: it registers itself."""
    for node in TREES[name].body:
        for item in node.body if isinstance(node, ast.ClassDef) else []:
            names: list[ast.expr] = []
            if isinstance(item, ast.AnnAssign) and item.value is not None:
                names = [item.target]
            elif isinstance(item, ast.Assign):
                names = item.targets
            if any(isinstance(target, ast.Name) and target.id == "name" for target in names):
                return True
    return False


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downward(name: str) -> None:
    for target in inner(name):
        if layer(target) > layer(name):
            pytest.fail(f"{name} imports {target}, which is in a higher layer")
        same = layer(target) == layer(name) and house(target) != house(name)
        if same and not is_base(target):
            pytest.fail(f"{name} imports {target}, its sibling; only base modules may be imported")


@pytest.mark.parametrize("name", MODULES)
def test_techniques_do_not_import_each_other(name: str) -> None:
    for target in inner(name):
        if (
            house(target) in FAMILIES
            and house(name) in FAMILIES
            and target != f"tinier.{house(target)}"  # the folder itself, to scan it
            and not is_base(target)
            and has_technique(target)
            and (name, target) not in DEFAULTS
        ):
            pytest.fail(f"{name} imports the technique {target}; take an instance as an argument")


def test_no_cycles() -> None:
    graph = {name: {t for t in inner(name) if t != name} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("name", MODULES)
def test_no_hidden_imports(name: str) -> None:
    if name in FRESH_PROCESS:
        return
    for function in ast.walk(TREES[name]):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for target in targets(name, node):
                    if target.split(".")[0] not in OPTIONAL:
                        pytest.fail(f"{name}:{node.lineno} imports {target} inside a function")


@pytest.mark.parametrize("name", MODULES)
def test_optional_packages_are_imported_when_used(name: str) -> None:
    """Importing tinier must work where every extra is missing."""
    inside = {
        id(node)
        for function in ast.walk(TREES[name])
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try)
        for node in ast.walk(function)
    }
    for node, target in imports(name):
        if target.split(".")[0] in OPTIONAL and id(node) not in inside:
            pytest.fail(
                f"{name}:{node.lineno} imports {target}, which may be absent, when it is loaded"
            )


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{name} has {lines} lines; split it by what its parts do"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_unpickled(name: str) -> None:
    for target in (target.split(".")[0] for _, target in imports(name)):
        assert target not in {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.Call):
            continue
        options = {
            keyword.arg: keyword.value.value
            for keyword in node.keywords
            if keyword.arg and isinstance(keyword.value, ast.Constant)
        }
        where = f"{name}:{node.lineno}"
        assert options.get("weights_only") is not False, where
        assert options.get("allow_pickle") is not True, where
        assert options.get("trust_remote_code") is not True, where
        if ast.unparse(node.func) == "torch.load":
            assert options.get("weights_only") is True, f"{where}: torch.load(weights_only=True)"
        if ast.unparse(node.func) in {"np.load", "numpy.load"}:
            assert options.get("allow_pickle") is False, f"{where}: np.load(allow_pickle=False)"


@pytest.mark.parametrize("name", MODULES)
def test_errors_are_not_swallowed(name: str) -> None:
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ExceptHandler):
            broad = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
            empty = all(isinstance(item, ast.Pass) for item in node.body)
            assert not (broad and empty), f"{name}:{node.lineno} swallows every error"


def test_public_names() -> None:
    exported = set(getattr(tinier, "__all__", ()))
    assert exported == PUBLIC
    for name in exported:
        assert getattr(tinier, name).__doc__, f"tinier.{name} has no docstring"


def test_a_layer_for_every_folder() -> None:
    known = set().union(*LAYERS)
    here = {path.stem for path in SOURCE.glob("*.py")} | {
        p.parent.name for p in SOURCE.glob("*/__init__.py")
    }
    assert here <= known, f"in no layer: {', '.join(sorted(here - known))}"
