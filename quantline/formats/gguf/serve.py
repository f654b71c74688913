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

PROJECTOR_TEXT = """
With images or sound: `--mmproj {file}`.
"""


def serve_text(manifest: dict[str, Any]) -> str:
    """Return the section "## Serve it"; of a model in several files it names the first."""
    files = [name for name in manifest["files"] if name.endswith(".gguf")]
    projectors = [name for name in files if name.startswith("mmproj")]
    text = TEXT.replace("{file}", min(set(files) - set(projectors)))
    for name in projectors:
        text += PROJECTOR_TEXT.replace("{file}", name)
    return text
