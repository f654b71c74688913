"""Bundles beside what llm-compressor, whose files vLLM serves, writes for the same models.

It has an environment of its own, which `make test-all` installs.
"""

import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.models.architectures import Architecture
from benchmarks.models.tiny_checkpoint import write_checkpoint
from benchmarks.paths import PEER_SCRIPTS
from benchmarks.quality.peers import ENVIRONMENTS, SETTINGS
from quantline.files import read_json, write_json
from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from tests.helpers.quantized import activations_rounded, rounded
from tests.helpers.variants import write_variant
from tests.helpers.vllm_rules import matches, quantized_in, shapes_of

ENVIRONMENT = ENVIRONMENTS / "llmcompressor"
INSTALL = "from benchmarks.quality.peers import peer_python; peer_python('llmcompressor')"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("llmcompressor"),  # it writes everything once
    pytest.mark.skipif(
        not (ENVIRONMENT / "complete").is_file(),
        reason=f'needs llm-compressor: make test-all, or python -c "{INSTALL}"',
    ),
]
# What its users leave as it is: heads, routers, towers, and layers that are too narrow.
IGNORED = (
    *("re:.*lm_head$", r"re:.*\.gate$", "re:.*router.*", "re:.*shared_expert_gate$"),
    *("re:.*vision.*", "re:.*projector.*", "re:.*in_proj_ba$"),
)
INTEGERS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
ROWS = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "symmetric": (INTEGERS | {"symmetric": True}, None),
    "asymmetric": (INTEGERS | {"symmetric": False}, None),
    "int8": (ROWS | {"type": "int"}, TOKENS | {"type": "int"}),
    "float8": (ROWS | {"type": "float"}, TOKENS | {"type": "float"}),
}
MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "granitemoehybrid")
DENSE = ("llama", "gemma3")
CASES = [(name, scheme) for name in DENSE for scheme in SCHEMES]
CASES += [(name, scheme) for name in MIXTURES for scheme in ("symmetric", "float8")]
WITH_IMAGES = ("gemma3",)
GPTQ = ("llama", "qwen3_moe")  # with its own calibration, where symmetric


class Written(NamedTuple):
    """What both have written, by model and scheme."""

    sources: dict[str, Checkpoint]
    theirs: Path


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Written:
    root = tmp_path_factory.mktemp("llmcompressor")
    sources = {}
    for name in (*DENSE, *MIXTURES):
        auto = "AutoModelForImageTextToText" if name in WITH_IMAGES else "AutoModelForCausalLM"
        write_checkpoint(Architecture(name, auto), root / name)
        found = Checkpoint(root / name)
        structure = verify.check_blocks(found) if found.structure else None
        sources[name] = Checkpoint(root / name, structure=structure)
    jobs = [
        {
            "model": str(root / name),
            "out": str(root / f"{name}-{scheme}"),
            "method": "gptq" if name in GPTQ and scheme == "symmetric" else "rtn",
            "weights": SCHEMES[scheme][0],
            "activations": SCHEMES[scheme][1],
            "ignore": IGNORED,
        }
        for name, scheme in CASES
    ]
    write_json(root / "jobs.json", jobs)
    script = PEER_SCRIPTS / "llmcompressor_files.py"
    process = subprocess.run(
        [str(ENVIRONMENT / "bin/python"), str(script), str(root / "jobs.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,  # it writes a log there
        env=os.environ | SETTINGS | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return Written(sources, root)


@pytest.fixture
def both(request, written, tmp_path) -> tuple[Path, Path]:
    """The folder that quantline writes, and llm-compressor's."""
    name, scheme = request.param
    source = written.sources[name]
    if scheme in ("int8", "float8"):
        quantized = activations_rounded(tmp_path / "q", source, scheme)
    else:
        quantized = rounded(tmp_path / "q", source, 4, 32, symmetric=scheme == "symmetric")
    write_variant("safetensors", tmp_path / "out", source, quantized)
    return tmp_path / "out", written.theirs / f"{name}-{scheme}"


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return tensor → type and shape, but for two things that servers read either way.

    llm-compressor takes the biases of fused experts apart, which are stored as published here; and
    transformers keeps a router's correction in float32, whatever it is stored as.
    """
    found = shapes_of(folder)
    return {
        name: (kind if not name.endswith("correction_bias") else "", shape)
        for name, (kind, shape) in found.items()
        if not (".experts." in name and name.endswith(("_bias", ".bias")))
    }


def quantization_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")["quantization_config"]


@pytest.mark.parametrize("both", CASES, indirect=True, ids="-".join)
def test_tensors_have_the_names_types_and_shapes_of_llmcompressors(both):
    ours, theirs = map(tensors_of, both)
    assert ours == theirs


@pytest.mark.parametrize("both", CASES, indirect=True, ids="-".join)
def test_config_says_what_llmcompressors_says(both):
    ours, theirs = map(quantization_of, both)
    for key in ("quant_method", "format", "quantization_status", "kv_cache_scheme"):
        assert ours[key] == theirs[key]
    assert ours["config_groups"].keys() == theirs["config_groups"].keys()
    for name, group in ours["config_groups"].items():
        other = theirs["config_groups"][name]
        assert group["targets"] == other["targets"]
        for part in ("weights", "input_activations", "output_activations"):
            mine, their = group[part] or {}, other[part] or {}
            assert {key: their[key] for key in mine} == mine
            # What else it says is how it found the numbers. A static order leaves groups in place.
            rest = {key: value for key, value in their.items() if key not in mine and value}
            assert rest.pop("actorder", "static") == "static"
            assert set(rest) <= {"observer", "zp_dtype"}


@pytest.mark.parametrize("both", CASES, indirect=True, ids="-".join)
def test_what_llmcompressor_ignores_is_ignored(both):
    ours, theirs = (quantization_of(folder)["ignore"] for folder in both)
    assert not [name for name in theirs if not any(matches(name, entry) for entry in ours)]
    quantized = quantized_in(shapes_of(both[1]))
    assert not [name for name in quantized if any(matches(name, entry) for entry in ours)]
