"""How to serve an ONNX bundle, for its README."""

from typing import Any

from quantline.formats.onnx import genai_config

ONNXRUNTIME = """\
## Serve it

In Python (`pip install onnxruntime tokenizers numpy`), greedily and with the KV cache:

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
caches = [one for one in session.get_inputs() if one.name.startswith("past_key_values.")]
past = [np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for one in caches]
new, text = tokenizer.encode("Hello").ids, []
for _ in range(24):
    before = past[0].shape[2]
    logits, *past = session.run(None, {
        "input_ids": np.array([new], np.int64),
        "position_ids": np.arange(before, before + len(new), dtype=np.int64)[None],
        "attention_mask": np.ones((1, before + len(new)), np.int64),
        **{one.name: value for one, value in zip(caches, past)}})
    new = [int(logits[0, -1].argmax())]
    text += new
print(tokenizer.decode(text))
```
"""

GENAI = """\
## Serve it

In Python (`pip install onnxruntime-genai`):

```python
import onnxruntime_genai as genai

model = genai.Model(".")
tokenizer, settings = genai.Tokenizer(model), genai.GeneratorParams(model)
prompt = tokenizer.encode("Hello")
settings.set_search_options(max_length=len(prompt) + 24)
generator = genai.Generator(model, settings)
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""


def serve_text(manifest: dict[str, Any]) -> str:
    """Return the section "## Serve it", for the runtime that the bundle was made for."""
    return GENAI if genai_config.FILE in manifest["files"] else ONNXRUNTIME
