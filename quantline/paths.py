"""Where a project keeps what its stages make, relative to its root."""

from pathlib import Path

MODEL = Path("artifacts/model")
CALIBRATION = Path("artifacts/calibration")
REFERENCE = Path("artifacts/reference")
QUANTIZED = Path("artifacts/quantized")  # one folder per recipe
EXPORTS = Path("artifacts/exports")  # one bundle per variant
METRICS = Path("metrics")
REPORTS = Path("reports")
EVENTS = Path("events.jsonl")
