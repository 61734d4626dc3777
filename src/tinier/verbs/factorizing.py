"""Factorize: layers whose weights are nearly of low rank become several smaller ones."""

from collections.abc import Sequence
from typing import Any

from tinier.edits.factorize import Factorize
from tinier.edits.quantize import refuse_quantized
from tinier.errors import RefusedError
from tinier.methods.factorization import Factorization
from tinier.network import Example
from tinier.statistics import observe
from tinier.verbs.calibration import calibration, labelled
from tinier.verbs.smaller import Smaller, network_of, since

KEEP = 0.5  # where nothing says how much


def factorize(
    model: Any,
    example: Example | None = None,
    data: Any = None,
    *,
    keep: float | None = None,
    energy: float | None = None,
    of: str = "macs",
    form: str = "auto",
    exclude: Sequence[str] = (),
) -> Smaller:
    """Replace linear layers and convolutions by products of smaller ones.

    Args:
        model: an ``nn.Module``, a path, or what another step gave; never changed.
        example: example inputs; None where the model brings its own.
        data: a few hundred examples, of which at most 512 are used: factors are nearest where real inputs lie; labels are not used. None
            for the weights alone.
        keep: share in (0, 1) of the cost that is left, reached with one share of the energy for all layers; 0.5 where ``energy`` is not
            given either.
        energy: share in (0, 1] of each layer's squared outputs that is kept.
        of: "macs" or "parameters".
        form: of wide convolutions: "svd", "tucker", or "auto", for each the nearer one.
        exclude: patterns of modules or parameters that stay.

    Returns:
        The network with more and smaller layers, of its class; ``recover`` trains it.

    Raises:
        InputError: an argument is out of its range.
        RefusedError: nothing can be factorized, ``keep`` cannot be reached, or the network is quantized.

    Cost:
        A singular value decomposition of each layer; with data a run over it and, for each layer, 8 · (inputs · kernel)² bytes.

    Source:
        See `tinier.methods.factorization.Factorization`.
    """
    if keep is None and energy is None:
        keep = KEEP
    names = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    method = Factorization(energy=energy, keep=keep, of=of, form=form, exclude=names)
    network = network_of(model, example, data)
    network.need_values("factorize")
    refuse_quantized(network)
    statistics = None
    if data is not None:
        statistics = observe(network, labelled(calibration(data, network), network), {"gram"})
    plan = method.plan(network, statistics)
    if not plan.edits:
        raise RefusedError(
            f"{network.name}: no layer would be smaller as a product; ask for less energy than {energy}"
        )
    made = plan.apply(network)
    count = sum(isinstance(edit, Factorize) for edit in plan.edits)
    original, whole = since(model, network, plan)
    note = f"{count} layers are products of smaller ones"
    return Smaller(made, original, whole, notes=(*network.notes, note))
