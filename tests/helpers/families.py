"""A tiny model of each family, with what several tests make of it, made once."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quantline.calibration.collect import collect_statistics
from quantline.calibration.store import INFO, CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.files import write_json
from quantline.ingest.verify import check_blocks
from quantline.model.checkpoint import Checkpoint
from quantline.model.family import FAMILIES
from quantline.quantized.store import QuantizedModel
from quantline.recipes.quantize import quantize_model
from tests.helpers.models import write_model
from tests.helpers.quantized import rounded, tokens_of, torch_logprobs, torch_model
from tests.helpers.variants import write_variant

GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 16}
SIZES: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 2,
    },
}
UNTIED = ("phi", "phi3", "gpt_neox", "mixtral")
ALL = sorted(FAMILIES)
WITH_EXPERTS = [name for name in ALL if FAMILIES[name].sparse]
# A grid for the methods that have one.
GRID = {"group_size": 32, "symmetric": False}
GPTQ_CURVATURE = GRID | {"method": "gptq", "bits": 4, "curvature": True}
INT8 = {"method": "int8"}
WITH_GROUPS = ("rtn", "gptq", "awq")


class FamilyModel:
    """A tiny model of one family, or of one that has no table, with other sizes if wanted."""

    def __init__(self, folder: Path, model_type: str, **others: Any) -> None:
        self.folder = folder
        self._quantized: dict[str, QuantizedModel] = {}
        self._bundles: dict[str, Path] = {}
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_key_value_heads": 4,
            "tie_word_embeddings": model_type not in UNTIED,
        }
        sizes |= SIZES.get(model_type, {}) | others
        model = write_model(folder / "model", model_type, **sizes)
        self.checkpoint = Checkpoint(model)
        if model_type not in FAMILIES:
            self.checkpoint = Checkpoint(model, structure=check_blocks(self.checkpoint))
        self.arch = self.checkpoint.arch
        self.tokens = tokens_of(self.checkpoint)

    @cached_property
    def calibration(self) -> CalibrationStore:
        """Statistics of random tokens, with gradients."""
        folder = self.folder / "calibration"
        folder.mkdir()
        tokens = tokens_of(self.checkpoint, 16, 40)
        layers = collect_statistics(self.checkpoint, tokens, folder, seed=0)
        info = {
            "layers": layers,
            "curvature": True,
            "text_sha256": "0" * 64,
            "tokens": tokens.size,
            "seed": 0,
        }
        write_json(folder / INFO, info)
        return CalibrationStore(folder)

    @cached_property
    def unquantized(self) -> QuantizedModel:
        """A store without quantized layers."""
        return rounded(self.folder / "unquantized", self.checkpoint, bits=0)

    @cached_property
    def logprobs(self) -> np.ndarray:
        """What torch computes for `tokens`, in float32."""
        return torch_logprobs(torch_model(self.checkpoint, self.unquantized), self.tokens)

    def quantized(self, recipe: dict[str, Any]) -> QuantizedModel:
        """Return the model as a recipe quantizes it, by default without embedding and head."""
        if recipe["method"] in WITH_GROUPS:
            recipe = {"embedding_bits": None} | recipe
        key = json.dumps(recipe, sort_keys=True)
        if key not in self._quantized:
            folder = self.folder / f"quantized-{len(self._quantized)}"
            folder.mkdir()
            options = parse_recipe(recipe)
            quantize_model("recipe", options, self.checkpoint, self.calibration, folder)
            self._quantized[key] = QuantizedModel(folder)
        return self._quantized[key]

    def bundle(self, format: str, quantized: QuantizedModel, **options: Any) -> Path:
        """Return the folder of a container that holds these weights."""
        key = json.dumps([format, str(quantized.folder), options], sort_keys=True)
        if key not in self._bundles:
            folder = self.folder / f"bundle-{len(self._bundles)}"
            write_variant(format, folder, self.checkpoint, quantized, **options)
            self._bundles[key] = folder
        return self._bundles[key]
