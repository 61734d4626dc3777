"""Equal scales of all channels in an ONNX file as one: what hardware without a scale a channel reads."""

import numpy as np
import onnx
from onnx import numpy_helper

from tinier.targets.onnx_integers import Wiring, drop_dead


def share_scales(model: onnx.ModelProto) -> None:
    """Rewrite, in place, ``DequantizeLinear`` of a constant whose channels all have one scale and zero point: these become numbers.

    What is computed stays the same, bit for bit.
    """
    found = Wiring(model)
    changed = False
    for node in found.graph.node:
        names = list(node.input)
        if node.op_type != "DequantizeLinear" or any(name not in found.constants for name in names):
            continue
        if any(a.name == "block_size" and a.i for a in node.attribute):
            continue
        numbers = [found.array(name) for name in names[1:]]
        if any(one.ndim != 1 or len(one) < 2 or (one != one[0]).any() for one in numbers):
            continue
        for place, (name, one) in enumerate(zip(names[1:], numbers, strict=True), start=1):
            single = f"{name}_of_all"
            if single not in found.constants:
                found.add(numpy_helper.from_array(np.array(one[0]), single))
            node.input[place] = single
        kept = [a for a in node.attribute if a.name != "axis"]
        del node.attribute[:]
        node.attribute.extend(kept)
        changed = True
    if changed:
        drop_dead(model)
