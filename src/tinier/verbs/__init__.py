"""The single steps of the main job, for those who want to take them one by one."""

from tinier.verbs.activations import linearize
from tinier.verbs.delivery import deliver
from tinier.verbs.disk import load, save
from tinier.verbs.distilling import distill
from tinier.verbs.factorizing import factorize
from tinier.verbs.pruning import prune
from tinier.verbs.quantization import quantize
from tinier.verbs.sharing import share
from tinier.verbs.smaller import Smaller
from tinier.verbs.sparsity import sparsify
from tinier.verbs.steps import export, recover
from tinier.verbs.storage import pack, unpack

__all__ = [
    "Smaller",
    "deliver",
    "distill",
    "export",
    "factorize",
    "linearize",
    "load",
    "pack",
    "prune",
    "quantize",
    "recover",
    "save",
    "share",
    "sparsify",
    "unpack",
]
