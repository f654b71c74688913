"""The formats of quantized checkpoints, one file each, found by `quant_method`."""
