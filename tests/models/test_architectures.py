"""A dozen architectures that differ most go from a checkpoint to a measured GPTQ bundle.

`make models` takes all of them, and every format (docs/models.md).
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.models.architectures import architecture
from benchmarks.models.journey import Journey
from benchmarks.models.project import begin_template
from benchmarks.models.tiny_sizes import OVERRIDES, TEXT

# Architecture → the share of the blocks' weights that is at least rounded. The rest are norms,
# routers, convolutions, and the parameters of state spaces and of inputs of each layer.
ROUNDED = {
    "bloom": 0.99,  # ALiBi; blocks that return tuples
    "deepseek_v3": 0.98,  # latent attention; a router with a bias
    "gemma3": 0.99,  # a wrapper
    "gemma3n_text": 0.9,  # keys shared across layers, inputs of each layer
    "gpt_oss": 0.98,  # experts that are interleaved, transposed and biased; sinks
    "jetmoe": 0.98,  # experts in the attention too
    "llama4_text": 0.98,  # experts of its own form
    "nemotron_h": 0.98,  # Mamba 2, a mixture, attention and a plain layer
    "falcon": 0.99,  # linear layers of a class of its own
    "olmoe": 0.98,  # experts in the usual form
    "qwen3_5_text": 0.98,  # gated delta nets beside attention
}


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A project without a model; grids that are not searched for halve the time of rounding."""
    folder = tmp_path_factory.mktemp("template") / "project"
    return begin_template(folder, "recipes.gptq-w4g32.scales=minmax")


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Make the feed-forward layers, of which experts have many, narrower than `make models` does.

    Nothing else of an architecture depends on their width, and rounding them takes the most time.
    """
    for sizes in (TEXT, OVERRIDES["falcon"], OVERRIDES["llama4_text"]):
        for name in sizes:
            if "intermediate_size" in name or name == "ffn_hidden_size":
                monkeypatch.setitem(sizes, name, 128)


@pytest.fixture
def travel(template, tmp_path, monkeypatch, narrow) -> Callable[[str], Journey]:
    """travel(name) takes an architecture through the stages."""
    monkeypatch.chdir(tmp_path)  # the journey changes the folder

    def run(name: str) -> Journey:
        project = shutil.copytree(template, tmp_path / "project")
        journey = Journey(name, architecture(name), project, tmp_path / "record.json")
        journey.run(("bf16", "gptq-w4g32"))
        return journey

    return run


def failures(journey: Journey) -> dict[str, str]:
    """Return step → its failure."""
    return {label: step["failure"] for label, step in journey.steps.items() if step["failure"]}


@pytest.mark.parametrize("name", ROUNDED)
def test_architecture_is_calibrated_rounded_and_measured(name, travel):
    journey = travel(name)
    assert failures(journey) == {}, journey.steps
    figures = journey.record["figures"]
    assert figures["whole"]["difference"] < 1e-3
    assert figures["bf16"]["difference"] < 1e-3
    assert abs(figures["bf16"]["mean_kld"]) < 1e-6
    assert 1e-5 < figures["gptq-w4g32"]["mean_kld"] < 0.2
    assert figures["gptq-w4g32"]["rounded"] > ROUNDED[name]


def test_layers_that_are_stored_transposed_are_rounded_and_refused_where_nothing_loads_them(travel):
    journey = travel("openai-gpt")
    refused = {"export gptq-w4g32": "unsupported_architecture"}
    assert failures(journey) == refused, journey.steps
    assert journey.record["figures"]["bf16"]["difference"] < 1e-3
