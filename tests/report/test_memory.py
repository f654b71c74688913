"""The memory that a variant takes, and its limit."""

from quantline.report.memory import kv_cache_bytes, memory_use, read_architecture
from tests.helpers.report import ARCH, TARGET, make_row


def test_memory_use_that_was_not_measured_does_not_pass_a_limit():
    target = TARGET.model_copy(update={"max_memory_mib": 1000.0})
    assert make_row("a", 2, 0.01, target).objections == []
    assert "not known" in make_row("b", 2, 0.01, target, speed={}).objections[0]


def test_memory_use_includes_the_kv_cache_at_the_context():
    assert kv_cache_bytes(ARCH, 4096, 2) == 2 * 6 * 2 * 32 * 2 * 4096  # 6 MiB
    target = TARGET.model_copy(update={"max_memory_mib": 305.0, "context": 4096})
    assert make_row("gguf", 2, 0.01, target).objections == [
        "memory is 306 MiB, over the limit of 305 MiB (300.0 MiB measured peak + 2 × 6 layers × "
        "2 KV heads × 32 wide × 2 bytes × 4096 tokens = 300.0 + 6.0 MiB)"
    ]


def test_memory_use_counts_the_size_on_disk_for_other_hardware():
    target = TARGET.model_copy(update={"context": 4096, "memory": "size"})
    onnx = make_row("onnx", 2, 0.01, target, format="onnx", runtime="onnxruntime")
    assert onnx.memory["mib"] == 2 + 12  # its cache is in float32
    assert onnx.memory["provenance"] == "estimated"
    assert memory_use(onnx, target, None)["mib"] is None
    without_context = memory_use(onnx, TARGET, ARCH)
    assert without_context["mib"] == 300
    assert without_context["provenance"] == "measured"


def test_read_architecture_is_none_without_a_model(tmp_path):
    assert read_architecture(tmp_path) is None
