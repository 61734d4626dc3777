"""What one pass over data collects: ranges for quantization; moments, Gram matrices and gradients for criteria."""

from tinier.statistics.activations import collect, floating_activations
from tinier.statistics.base import Statistics
from tinier.statistics.streaming import observe

__all__ = ["Statistics", "collect", "floating_activations", "observe"]
