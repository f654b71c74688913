"""The README of a bundle: the lines that serve it."""

from typing import Any

README = """\
# {variant}

Recipe {recipe[name]} ({recipe[method]}) in {format}, measured in {runtime}. {bits:.2f} bits per weight, {mib:.1f} MiB.
What was done to it, step by step, is in manifest.json; what it answers, in smoke.json.

    artifact sha256  {sha256}

{serve}"""

SAFETENSORS = """\
## Serve it

{vllm}
In Python (`pip install torch transformers{package}`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("Hello", return_tensors="pt", add_special_tokens=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=24)[0]))
```
"""

VLLM = """\
```
vllm serve .
```
"""

NO_VLLM = "vLLM has no kernels for {bits}-bit integers; transformers expands them and computes in floating point.\n"

GGUF = """\
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

ONNX = """\
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


def readme(manifest: dict[str, Any]) -> str:
    """README.md for a bundle with this manifest."""
    recipe = manifest["recipe"]
    bits = 8 if recipe["method"] == "int8" else recipe.get("bits")
    vllm = VLLM if bits in (None, 4, 8) else NO_VLLM.format(bits=bits)
    first = min((name for name in manifest["files"] if name.endswith(".gguf")), default="")
    onnx = GENAI if manifest["runtime"] == "onnxruntime-genai" else ONNX
    serve = {"gguf": GGUF.replace("{file}", first), "onnx": onnx}.get(manifest["format"]) or SAFETENSORS.format(
        vllm=vllm, package="" if recipe["method"] == "none" else " compressed-tensors")
    return README.format(serve=serve, variant=manifest["variant"], recipe=recipe, format=manifest["format"],
                         runtime=manifest["runtime"], bits=manifest["bits_per_weight"],
                         mib=manifest["size_bytes"] / 2**20, sha256=manifest["artifact_sha256"])
