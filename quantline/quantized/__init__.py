"""The canonical store of quantized weights, which every method writes and every container reads."""
