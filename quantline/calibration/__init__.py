"""Statistics of the unquantized model on the calibration text: second moments of inputs and of output gradients."""
