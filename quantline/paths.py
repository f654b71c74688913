"""Where a project keeps what its stages make, relative to its root."""

from pathlib import Path

ARTIFACTS = Path("artifacts")
MODEL = ARTIFACTS / "model"
CALIBRATION = ARTIFACTS / "calibration"
REFERENCE = ARTIFACTS / "reference"
ANSWERS = ARTIFACTS / "answers"  # of the unquantized model to the smoke prompts
QUANTIZED = ARTIFACTS / "quantized"  # one folder per recipe
EXPORTS = ARTIFACTS / "exports"  # one bundle per variant
MEASURING = ARTIFACTS / "measuring"  # what workers make, while a bundle is measured
METRICS = Path("metrics")
REPORTS = Path("reports")
EVENTS = Path("events.jsonl")
CHECKED = ARTIFACTS / "checked.json"  # there once the inputs were found right
