"""Make a real trained model, and the texts that it is measured on.

    python -m benchmarks.real_models smollm2-135m /tmp/smollm2
    python -m benchmarks.quality --model /tmp/smollm2/model \
        --calibration /tmp/smollm2/calibration.txt --evaluation /tmp/smollm2/evaluation.txt

The models come as 4-bit GGUF files; noise as large as their rounding is added (noise.py), so the
result is a little worse than the original, with the activations of a real model. Tensors of more
than 4 bits get none: of Gemma's blocks that is all but the outputs of attention and half of the
down projections.
"""

import argparse
from pathlib import Path

from benchmarks.real_models.models import MODELS, write_model
from benchmarks.real_models.texts import write_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path, help="it is made; the model is in model/")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    write_texts(options.folder)
    write_model(MODELS[options.name], options.folder / "model")


if __name__ == "__main__":
    main()
