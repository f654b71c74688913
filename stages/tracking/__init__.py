"""Run events, MLflow runs, atomic outputs and named failures."""

from stages.tracking.failures import Failure, Reason, StageError
from stages.tracking.outputs import (
    atomic_folder,
    describe_files,
    sha256_file,
    sha256_json,
    versions,
    write_json,
    write_text,
)
from stages.tracking.stage import EVENTS, StageRun, stage_run

__all__ = ["EVENTS", "Failure", "Reason", "StageError", "StageRun", "atomic_folder", "describe_files", "sha256_file",
           "sha256_json", "stage_run", "versions", "write_json", "write_text"]
