"""How to serve an ONNX bundle, for its README."""

from typing import Any

from quantline.formats.onnx import genai_config

ONNXRUNTIME = """\
## Serve it

In Python (`pip install onnxruntime tokenizers numpy`), greedily and with the states carried:

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
inputs = session.get_inputs()
names = [one.name for one in inputs]
sizes = {"batch": 1, "past": 0}
past = {one.name: np.zeros([sizes.get(size, size) for size in one.shape], np.float32)
        for one in inputs if one.name.startswith("past_")}
before, new, text = 0, tokenizer.encode("Hello").ids, []
for _ in range(24):
    after = before + len(new)
    tokens = {
        "input_ids": np.array([new], np.int64),
        "position_ids": np.arange(before, after, dtype=np.int64)[None],
        "attention_mask": np.ones((1, after), np.int64)}
    taken = {name: value for name, value in tokens.items() if name in names}
    logits, *states = session.run(None, taken | past)
    past = dict(zip(past, states))
    before, new = after, [int(logits[0, -1].argmax())]
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
