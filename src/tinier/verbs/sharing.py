"""Share: the weights of each tensor take few values, so that the packed file is small."""

from collections.abc import Sequence
from typing import Any

from tinier.edits.quantize import refuse_quantized
from tinier.edits.share import Share
from tinier.errors import InputError
from tinier.methods.weight_sharing import WeightSharing
from tinier.network import Example
from tinier.statistics import observe
from tinier.verbs.calibration import calibration, labelled
from tinier.verbs.smaller import Smaller, network_of, since


def share(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    bits: int = 4,
    rule: str = "kmeans",
    exclude: Sequence[str] = (),
) -> Smaller:
    """Give the weights of each tensor at most 2^bits values, of which ``pack`` stores a codebook and a label for each weight.

    The network stays of its class and computes in float; what is smaller is the packed file, not the memory or the time at run time.

    Args:
        model: an ``nn.Module``, a path, or what another step gave, best a pruned one; never changed.
        example: example inputs; None where the model brings its own.
        data: a few hundred examples, of which at most 512 are used, so that an error counts as much as the loss feels it, of their labels
            where they have some; None for all errors alike. For "kmeans" alone.
        bits: of a label, 1 to 8.
        rule: "kmeans": the values of least squared error; "median": uniform steps to both sides of the median; "minmax": uniform steps from
            the least to the largest weight.
        exclude: patterns of modules or parameters that are left alone.

    Returns:
        The network with shared values; ``pack`` says how many bytes it takes.

    Raises:
        InputError: an argument is out of its range.
        RefusedError: there is no weight to share, or the network is quantized.

    Cost:
        Sorting the weights of each tensor, seconds for millions; with data a run forward and backward for each example.

    Source:
        Han et al. 2016, "Deep Compression", section 3; Choi et al. 2017, "Towards the Limit of Network Quantization", section 3.
    """
    names = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    method = WeightSharing(bits=bits, rule=rule, exclude=names)
    if data is not None and rule != "kmeans":
        raise InputError(
            f"data: rule={rule!r} takes all errors alike; leave data out, or use kmeans"
        )
    network = network_of(model, example, data)
    network.need_values("share")
    refuse_quantized(network)
    statistics = None
    if data is not None:
        batches = labelled(calibration(data, network), network)
        statistics = observe(network, batches, {"squares"})
    plan = method.plan(network, statistics)
    count = sum(isinstance(edit, Share) for edit in plan.edits)
    note = f"{count} tensors take at most {2**bits} values each; pack stores them in {bits} bits a weight or less"
    original, whole = since(model, network, plan)
    return Smaller(plan.apply(network), original, whole, notes=(*network.notes, note))
