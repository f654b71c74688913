"""What serves a bundle, and what is said where nothing can."""

import sys

import pytest

from quantline.config.runtimes import RUNTIMES
from quantline.errors import Failure, StageError
from quantline.runtimes import servers
from quantline.runtimes.servers import Address, server_command

ADDRESS = Address("127.0.0.1", 8123, "gguf-q4_k_m")


@pytest.fixture
def bundle(tmp_path):
    for name in ("mine-1B-Q4_K_M.gguf", "mmproj-mine-1B.gguf"):
        (tmp_path / name).touch()
    return tmp_path


def test_server_command_of_gguf_starts_llama_cpps_own(bundle, monkeypatch):
    monkeypatch.setattr(servers, "find_spec", lambda name: object())
    assert server_command("llama.cpp", bundle, ADDRESS) == [
        *(sys.executable, "-m", "llama_cpp.server"),
        *("--model", str(bundle / "mine-1B-Q4_K_M.gguf")),
        *("--clip_model_path", str(bundle / "mmproj-mine-1B.gguf")),
        *("--model_alias", "gguf-q4_k_m"),
        *("--host", "127.0.0.1", "--port", "8123"),
    ]


def test_server_command_of_safetensors_takes_vllm_where_it_is(bundle):
    for runtime in ("transformers", "vllm"):
        command = server_command(runtime, bundle, ADDRESS._replace(python="/other/python"))
        assert command[:4] == ["/other/python", "-m", "vllm.entrypoints.cli.main", "serve"]
        assert command[4:6] == [str(bundle), "--served-model-name"]


@pytest.mark.parametrize(
    ("runtime", "said"),
    [
        ("llama.cpp", r"sse_starlette.*pip install 'quantline\[serve\]'"),
        ("transformers", "requirements-vllm.txt"),
        ("onnxruntime", r"a server of its own \(llama.cpp, .*\), found onnxruntime"),
    ],
)
def test_server_command_says_what_is_missing(bundle, monkeypatch, runtime, said):
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    with pytest.raises(StageError, match=said) as caught:
        server_command(runtime, bundle, ADDRESS)
    assert caught.value.failure == Failure.RUNTIME_UNAVAILABLE


def test_every_server_that_a_runtime_names_is_there(bundle):
    for info in RUNTIMES.values():
        if info.server:
            assert callable(servers.load_object(info.server))
