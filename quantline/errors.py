"""What can go wrong: the closed lists of names, and the exceptions that carry them."""

from enum import StrEnum


class Reason(StrEnum):
    """`reason_code` of a run event: which promise was not kept, or which step was taken."""

    STAGE_STARTED = "stage_started"
    STAGE_FINISHED = "stage_finished"
    LOAD_REJECTED = "load_rejected"
    CALIBRATION_FAILED = "calibration_failed"
    REFERENCE_FAILED = "reference_failed"
    EXPORT_QUANTIZATION_FAILED = "export_quantization_failed"
    EXPORT_RUN_FAILED = "export_run_failed"
    EXPORT_ARTIFACT_MISSING = "export_artifact_missing"
    EVAL_RUNTIME_ERROR = "eval_runtime_error"
    EVAL_DATASET_MISSING = "eval_dataset_missing"
    COMPARE_FAILED = "compare_failed"
    RUN_NOT_TRACKED = "run_not_tracked"
    MODEL_REGISTERED = "model_registered"
    MODEL_NOT_REGISTERED = "model_not_registered"
    CONFIG_INVALID = "config_invalid"
    PIPELINE_REFUSED = "pipeline_refused"


class Failure(StrEnum):
    """`payload.failure` of a run event: the cause."""

    UNSAFE_CHECKPOINT = "unsafe_checkpoint"
    CUSTOM_CODE = "custom_code"
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture"
    MISSING_SHARD = "missing_shard"
    MISSING_TOKENIZER = "missing_tokenizer"
    MISSING_FILE = "missing_file"
    NON_FINITE = "non_finite"
    PATH_ESCAPE = "path_escape"
    ADAPTER_MISMATCH = "adapter_mismatch"
    CONVERTER_FAILED = "converter_failed"
    CONVERTER_UNAVAILABLE = "converter_unavailable"
    CALIBRATION_EMPTY = "calibration_empty"
    IMPORTANCE_MISSING = "importance_missing"
    IMPORTANCE_INVALID = "importance_invalid"
    TEXTS_OVERLAP = "texts_overlap"
    HESSIAN_NOT_POSITIVE_DEFINITE = "hessian_not_positive_definite"
    WORSE_THAN_ROUND_TO_NEAREST = "worse_than_round_to_nearest"
    UNSUPPORTED_WIDTH = "unsupported_width"
    TYPE_SUBSTITUTED = "type_substituted"
    TOKENIZER_MISMATCH = "tokenizer_mismatch"
    READBACK_MISMATCH = "readback_mismatch"
    SMOKE_FAILED = "smoke_failed"
    ARTIFACT_CHANGED = "artifact_changed"
    STALE = "stale"
    DATASET_INVALID = "dataset_invalid"
    OUT_OF_MEMORY = "out_of_memory"
    TIMED_OUT = "timed_out"
    DISK_FULL = "disk_full"
    DISK_ERROR = "disk_error"
    PERMISSION_DENIED = "permission_denied"
    TOO_MANY_OPEN_FILES = "too_many_open_files"
    NAME_TOO_LONG = "name_too_long"
    INTERRUPTED = "interrupted"
    KILLED = "killed"
    RUNTIME_UNAVAILABLE = "runtime_unavailable"
    RUNTIME_CRASHED = "runtime_crashed"
    WORKER_LOST = "worker_lost"
    NETWORK_UNAVAILABLE = "network_unavailable"
    TRACKING_REFUSED = "tracking_refused"
    PROMOTION_REFUSED = "promotion_refused"
    PUBLICATION_REFUSED = "publication_refused"
    CONFIG_STALE = "config_stale"
    CONFIG_INVALID = "config_invalid"
    PROJECT_BUSY = "project_busy"
    PIPELINE_REFUSED = "pipeline_refused"
    INTERNAL_ERROR = "internal_error"


REASON_OF_STAGE = {
    "check": Reason.CONFIG_INVALID,
    "load": Reason.LOAD_REJECTED,
    "calibrate": Reason.CALIBRATION_FAILED,
    "answer": Reason.REFERENCE_FAILED,
    "reference": Reason.REFERENCE_FAILED,
    "quantize": Reason.EXPORT_QUANTIZATION_FAILED,
    "export": Reason.EXPORT_RUN_FAILED,
    "smoke": Reason.EXPORT_RUN_FAILED,
    "evaluate": Reason.EVAL_RUNTIME_ERROR,
    "lm_eval": Reason.EVAL_RUNTIME_ERROR,
    "compare": Reason.COMPARE_FAILED,
}


class StageError(Exception):
    """A stage cannot go on.

    The message says what was expected, what was found, and what to do next.
    """

    def __init__(self, failure: Failure, message: str, reason: Reason | None = None) -> None:
        """Name the failure; without a reason the stage's own applies (REASON_OF_STAGE)."""
        super().__init__(message)
        self.failure = failure
        self.reason = reason


class ConfigError(Exception):
    """params.yaml or conf/ cannot be used; the message says where, why, and what mends it."""

    failure = Failure.CONFIG_INVALID


class StaleError(ConfigError):
    """conf/ or params.yaml has changed since a stage or a composition read it."""

    failure = Failure.CONFIG_STALE


class BusyError(ConfigError):
    """Another run works in the project."""

    failure = Failure.PROJECT_BUSY
