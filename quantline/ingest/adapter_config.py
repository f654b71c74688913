"""adapter_config.json of a PEFT LoRA adapter: what it asks for, and what B A is multiplied by."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantline.errors import Failure, StageError
from quantline.files import read_json
from quantline.model.checkpoint_files import inside
from quantline.run.bounded_call import pattern_begins

CONFIG = "adapter_config.json"
# Options that change what is trained, beyond W + scaling · B A and what is stored beside it.
UNSUPPORTED = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)
# Options that say what was trained and how, and change nothing about how it is merged.
NEUTRAL = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
        "velora_config",
    }
)
# Other initializations (PiSSA, OLoRA, CorDA, LoftQ, …) change the base too, so that W + BA is not
# what was trained.
BASE_UNTOUCHED = (None, True, False, "gaussian", "eva", "orthogonal")
# What to do about an adapter that is not as expected.
NAME_BASE = "name the base model that it was trained on"
MERGE_FIRST = "merge this one with peft first, and load the result"
SAVE_AGAIN = "fetch it again, or save it again with peft"
PATTERN_SECONDS = 10.0  # for all patterns and modules of an adapter together


class AdapterConfig:
    """The options of an adapter.

    Attributes:
        folder: The adapter.
        values: The content of adapter_config.json.

    Raises:
        StageError: adapter_mismatch, missing_file, path_escape.
    """

    def __init__(self, folder: Path) -> None:
        """Read and check adapter_config.json."""
        self.folder = folder
        if not (folder / CONFIG).is_file():
            raise StageError(
                Failure.MISSING_FILE,
                f"expected an adapter, with {CONFIG}, in {folder}, found no such file; name the "
                "folder that peft saved (model.adapter)",
            )
        self.values = read_json(inside(folder, CONFIG))
        self._deadline = 0.0
        kind = self.values.get("peft_type")
        if kind != "LORA":
            raise self.mismatch(f"peft_type LORA, found {kind}", MERGE_FIRST)
        odd = [key for key in UNSUPPORTED if self.values.get(key)]
        odd += [key for key in self.values if key not in NEUTRAL and self.values[key]]
        initialization = self.values.get("init_lora_weights")
        if initialization not in BASE_UNTOUCHED:
            odd.append(f"init_lora_weights={initialization}")
        if odd:
            names = ", ".join(dict.fromkeys(odd))
            raise self.mismatch(f"LoRA without {names}", MERGE_FIRST)
        self.rank = self._number("r", self.values.get("r", 8), whole=True)
        self.alpha = self._number("lora_alpha", self.values.get("lora_alpha", 8))
        self.rank_pattern = self._pattern("rank_pattern", whole=True)
        self.alpha_pattern = self._pattern("alpha_pattern")

    def _pattern(self, key: str, whole: bool = False) -> dict[str, float]:
        patterns = self.values.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise self.mismatch(f"an object for {key}, found {patterns!r}", SAVE_AGAIN)
        return {
            name: self._number(f"{key}[{name!r:.80}]", value, whole)
            for name, value in patterns.items()
        }

    def _number(self, key: str, value: Any, whole: bool = False) -> float:
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not math.isfinite(value) or (whole and not value > 0):
            wanted = "a whole number above 0" if whole else "a number"
            raise self.mismatch(f"{wanted} for {key} in {CONFIG}, found {value!r:.80}", SAVE_AGAIN)
        return value

    def mismatch(self, expected: str, advice: str) -> StageError:
        """Return the error for an adapter that is not as expected.

        Args:
            expected: What was expected and what was found.
            advice: What to do next.
        """
        message = f"expected in the adapter {self.folder} {expected}; {advice}"
        return StageError(Failure.ADAPTER_MISMATCH, message)

    def scaling(self, module: str, rank: int) -> float:
        """Return what B A of a module is multiplied by, as peft's `scaling`.

        Raises:
            StageError: adapter_mismatch, if the rank is not what the options say, or a pattern
                takes too long.
        """
        expected = self._setting("rank_pattern", self.rank_pattern, module, self.rank)
        if rank != expected:
            raise self.mismatch(f"rank {expected} for {module}, found {rank}", SAVE_AGAIN)
        alpha = self._setting("alpha_pattern", self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def _setting(
        self, key: str, patterns: dict[str, float], module: str, otherwise: float
    ) -> float:
        """Return a module's own value.

        Patterns are regular expressions for the end of a module's name, as in peft. They come from
        others, and an expression can take years: no other begins after PATTERN_SECONDS.
        """
        self._deadline = self._deadline or time.monotonic() + PATTERN_SECONDS
        for pattern, value in patterns.items():
            if time.monotonic() > self._deadline:
                raise self.mismatch(
                    f"{key} that is matched within {PATTERN_SECONDS:g} s, found that "
                    f"{pattern!r:.80} takes longer",
                    MERGE_FIRST,
                )
            try:
                found = pattern_begins(rf"(.*\.)?({pattern})$", module)
            except RuntimeError as error:  # it is no regular expression
                raise self.mismatch(
                    f"a regular expression in {key}, found {pattern!r:.80} ({error})", SAVE_AGAIN
                ) from None
            if found:
                return value
        return otherwise

    def trained_rows(self, module: str) -> list[int]:
        """Return which rows of an embedding were trained on their own.

        Raises:
            StageError: adapter_mismatch, if adapter_config.json does not say, or not in numbers.
        """
        key = "trainable_token_indices"
        rows = self.values.get(key)
        if isinstance(rows, Mapping):
            named = [name for name in rows if f".{module}".endswith(f".{name}")]
            rows = rows[named[0]] if named else None
        numbers = rows if isinstance(rows, list) else []
        fits = all(type(row) is int and row >= 0 for row in numbers)
        if not numbers or not fits or len(set(numbers)) != len(numbers):
            raise self.mismatch(
                f"{key} with different token ids for {module}, found {rows!r:.80}", SAVE_AGAIN
            )
        return numbers
