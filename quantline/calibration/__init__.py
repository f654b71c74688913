"""Statistics of the unquantized model: second moments of inputs and of output gradients."""
