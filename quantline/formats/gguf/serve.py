"""How to serve a GGUF bundle, for its README."""

from typing import Any

from quantline.model.gguf_files import MODELFILE, model_file, projector_files

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

OLLAMA_TEXT = """
In Ollama, and in LM Studio, whose folder of models takes the file as it is:

```
ollama create my-model --file Modelfile
ollama run my-model
```
"""

PROJECTOR_TEXT = """
With images or sound: `--mmproj {file}`.
"""


def serve_text(manifest: dict[str, Any]) -> str:
    """Return the section "## Serve it"; of a model in several files it names the first."""
    names = list(manifest["files"])
    text = TEXT.replace("{file}", model_file(names))
    for name in projector_files(names):
        text += PROJECTOR_TEXT.replace("{file}", name)
    return text + (OLLAMA_TEXT if MODELFILE in names else "")
