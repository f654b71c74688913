"""Measurements of quantline beside other tools, one script each: `python -m benchmarks.<name>`."""

# It sets the process's environment, which has to precede numpy and torch.
import quantline  # noqa: F401
