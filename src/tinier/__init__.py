"""tinier makes a trained neural network smaller and faster, and proves what it cost."""

from tinier.version import VERSION as __version__

__all__ = ["__version__"]
