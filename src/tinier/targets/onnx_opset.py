"""The opset of an ONNX file: raised where the weights need it, with the operators that changed their form."""

import onnx

BLOCKS = 21  # the first with blocks and with four bits
_KINDS = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


def raise_opset(model: onnx.ModelProto) -> None:
    """Raise the opset, in place, where there are integers of four bits or with a scale for each block; else keep it.

    Older opsets are read by more runtimes. Operators that were changed since, as grid sampling and Fourier transforms, are rewritten.

    Cost:
        A copy of the model where it is raised.
    """
    nibbles = any(tensor.data_type in _KINDS for tensor in model.graph.initializer)
    blocks = any(a.name == "block_size" for node in model.graph.node for a in node.attribute)
    entries = [entry for entry in model.opset_import if not entry.domain]
    if not (nibbles or blocks) or entries[0].version >= BLOCKS:
        return
    from onnxscript import version_converter

    version_converter.convert_version(model, BLOCKS)
    entries[0].version = BLOCKS
