"""Where the benchmarks find the project, and where they write their results."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
PEER_SCRIPTS = ROOT / "benchmarks/peers"  # scripts that run in the environment of another tool
RESULTS = ROOT / "benchmarks/results"
DEMO_MODEL = Path("demo/model")  # relative to the root, where the benchmarks are started
DEMO_DATA = Path("demo/data")
