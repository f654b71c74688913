"""How to serve a safetensors bundle, for its README."""

from typing import Any

from quantline.formats.safetensors.layouts import LAYOUTS

TEXT = """\
## Serve it

{vllm}
{python}"""

PYTHON = """\
In Python (`pip install torch transformers{package}`):

```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {auto}.from_pretrained(".")
ids = tokenizer("Hello", return_tensors="pt", add_special_tokens=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=24)[0]))
```
"""

HELPED = """\
transformers alone does not load this bundle ({helped}). \
In Python quantline does, in transformers (`pip install quantline`); \
`engine.model` is transformers' own:

```python
from pathlib import Path
from quantline.runtimes.runtime import open_runtime

engine = open_runtime("transformers", Path("."), None)
ids = engine.encode_whole("Hello")
print(engine.decode(ids + engine.generate(ids, max_new_tokens=24, stop=set())))
```
"""

VLLM = """\
In vLLM, {tried}:

```
vllm serve .
```
"""

TRIED = "in which it was measured"
UNTRIED = "if that serves the model in this layout; it was not tried there"

FEW_BITS = """\
vLLM computes with {bits}-bit integers on NVIDIA GPUs alone, from release 0.33 on; \
transformers expands them and computes in floating point.
"""

VLLM_BITS = (None, 4, 8)  # None: the recipe has no bits, since they are always eight or all


def serve_text(manifest: dict[str, Any]) -> str:
    """Return the section "## Serve it", for the layout that the bundle is in.

    Args:
        manifest: As in manifest.json, with `helped` as in smoke.json.
    """
    recipe = manifest["recipe"]
    bits = recipe.get("bits")
    vllm = VLLM.format(tried=TRIED if manifest["runtime"] == "vllm" else UNTRIED)
    if bits not in VLLM_BITS:
        vllm += f"\n{FEW_BITS.format(bits=bits)}"
    package = ""
    if manifest["layers"]:  # some are quantized
        package = f" {LAYOUTS[layout_of_bundle(manifest)].package}"
    # A model that takes more than text; bundles of older releases do not say what they are.
    task = manifest.get("task", "text-generation")
    auto = "AutoModelForCausalLM" if task == "text-generation" else "AutoModelForImageTextToText"
    helped = manifest.get("helped")
    lines = HELPED.format(helped=helped) if helped else PYTHON.format(package=package, auto=auto)
    return TEXT.format(vllm=vllm, python=lines)


def layout_of_bundle(manifest: dict[str, Any]) -> str:
    """Return the layout that a bundle was exported in."""
    exports = [step for step in manifest["transforms"] if step["step"] == "export"]
    return exports[0]["layout"]
