"""The layers that compressed networks are made of.

Pruned networks keep the user's own layers, and quantized ones are graphs of quantize and dequantize operators, so that none is needed yet.
"""
