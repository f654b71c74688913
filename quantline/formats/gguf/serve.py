"""How to serve a GGUF bundle, for its README."""

from typing import Any

TEXT = """\
## Serve it

```
llama-server --model {file}
llama-cli --model {file} --prompt "Hello"
```

In Python (`pip install llama-cpp-python`):

```python
from llama_cpp import Llama

model = Llama("{file}", verbose=False)
print(model("Hello", max_tokens=24)["choices"][0]["text"])
```
"""


def serve_text(manifest: dict[str, Any]) -> str:
    """Return the section "## Serve it"; of a model in several files it names the first."""
    files = [name for name in manifest["files"] if name.endswith(".gguf")]
    return TEXT.replace("{file}", min(files))
