"""tinier makes a trained neural network smaller and faster, and proves what it cost."""

from tinier.compress import compress
from tinier.errors import TinierError
from tinier.inspect import inspect
from tinier.measure.files import measure_files as measure
from tinier.search.candidate import Result
from tinier.shrink import shrink
from tinier.verbs import (
    Smaller,
    deliver,
    distill,
    export,
    factorize,
    linearize,
    load,
    pack,
    prune,
    quantize,
    recover,
    save,
    share,
    sparsify,
    unpack,
)
from tinier.verify import verify
from tinier.version import VERSION as __version__

__all__ = [
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
]
