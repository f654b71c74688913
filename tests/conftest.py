"""Tiny models, texts and projects for the tests. Nothing here reaches the network."""

import os

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0",
                  TOKENIZERS_PARALLELISM="false", DO_NOT_TRACK="true", MLFLOW_DISABLE_TELEMETRY="true")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # they hold results against torch's on the CPU, often to the bit

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("quantline", database=None, deadline=None, derandomize=True)  # no files, no clock, no luck
settings.load_profile("quantline")
ROOT = Path(__file__).resolve().parent.parent
OWN_NAMES = {  # of sizes, where a family does not call them as others do, or does not have them
    "gpt2": {"intermediate_size": "n_inner", "num_key_value_heads": None, "head_dim": None},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None}}
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WORDS = """ada hugo rosa nico met the by a forest river old letter found called snow rain cheese bread boat early late
morning evening walked ran saw looked at and then they shared some of it with us 12 47 305 is was""".split()  # noqa: SIM905


def sentences(seed: int, documents: int) -> list[str]:
    """Documents of random words, none of which another seed gives."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(40)) + f" {seed}-{index}." for index in range(documents)]


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer with all 256 bytes, split digits and a chat template. Returns its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(sentences(0, 60), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
             "pad_token": "<|endoftext|>", "model_max_length": 256, "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer.get_vocab_size()


def write_model(folder: Path, model_type: str = "llama", seed: int = 0, max_shard_size: str = "1GB",
                **sizes) -> Path:
    """A random model with unlike channels, so that methods that look at the inputs have something to see."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "tie_word_embeddings": True} | sizes
    dtype = sizes.pop("dtype", torch.bfloat16)
    sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    for usual, own in OWN_NAMES.get(model_type, {}).items():
        value = sizes.pop(usual)
        sizes |= {own: value} if own else {}
    config = AutoConfig.for_model(
        model_type, vocab_size=write_tokenizer(folder), max_position_embeddings=256, initializer_range=0.05,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes)
    # transformers draws the weights from the global generator; fork it, so that nothing outside is disturbed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if tensor.ndim == 1:  # norms and biases
                    tensor.add_(0.3 * torch.randn_like(tensor))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """make_model(folder, model_type="llama", **config): writes a tiny random model and returns the folder."""
    return write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Llama, hidden 256, grouped-query attention, tied head, bfloat16. Shared: copy it before changing it."""
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_narrow(tmp_path_factory) -> Path:
    """Llama whose widths (64, 176) no k-quant of 256 fits; as many key heads as heads, a head of its own, float32."""
    import torch

    return write_model(tmp_path_factory.mktemp("narrow") / "model", hidden_size=64, intermediate_size=176,
                       num_key_value_heads=4, tie_word_embeddings=False, dtype=torch.float32, seed=1)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """A folder with calibration.txt, evaluation.txt and gold.jsonl that share nothing."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "calibration.txt").write_text("\n\n".join(sentences(1, 40)) + "\n")
    (folder / "evaluation.txt").write_text("\n\n".join(sentences(2, 30)) + "\n")
    items = [{"id": f"open-{i}", "task": "open", "prompt": f"Question number {i}: who met hugo by the river?",
              "answer": " ada"} for i in range(4)]
    items += [{"id": f"choice-{i}", "task": "choice", "prompt": f"Choose for case {i}, was it rain or snow then?",
               "answer": " rain", "choices": [" rain", " old snow"]} for i in range(4)]
    items += [{"id": "chat-0", "task": "chat", "prompt": "What did rosa find in the old boat?", "answer": "a letter",
               "messages": [{"role": "user", "content": "What did rosa find in the old boat?"}]}]
    (folder / "gold.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


class Project:
    """A project folder of its own, with the repository's conf/ and a params.yaml that points to tiny things."""

    def __init__(self, root: Path, model: Path, texts: Path) -> None:
        self.root, self.base = root, [
            "suite=quick", "model=local", f"model.path={model}",
            "calibration=file", f"calibration.path={texts / 'calibration.txt'}", "calibration.part=[0.0,1.0]",
            "calibration.sequences=8", "calibration.length=64",
            "evaluation=file", f"evaluation.path={texts / 'evaluation.txt'}", "evaluation.part=[0.0,1.0]",
            "evaluation.sequences=4", "evaluation.length=64", f"evaluation.gold={texts / 'gold.jsonl'}",
            "evaluation.smoke_tokens=4", "evaluation.speed.prompt_tokens=8", "evaluation.speed.new_tokens=4",
            "evaluation.speed.repetitions=1"]

    def compose(self, *overrides: str) -> None:
        """Write params.yaml from conf/; later overrides win."""
        from quantline.config.compose import as_yaml, compose

        self.root.joinpath("params.yaml").write_text(as_yaml(compose([*self.base, *overrides], root=self.root)))

    def stage(self, name: str, instance: str | None = None):
        """Run a stage in this process. SystemExit(1) if it fails, as on the command line."""
        import importlib

        from quantline.run.stage import stage_run

        with stage_run(name, instance) as run:
            return getattr(importlib.import_module(f"stages.{name}"), name)(run)

    def command(self, name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """`python -m stages.<name>` in a process of its own."""
        return subprocess.run([sys.executable, "-m", f"stages.{name}", *arguments], capture_output=True, text=True,
                              check=False, cwd=self.root, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)

    def events(self) -> list[dict]:
        """What events.jsonl holds."""
        path = self.root / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """An MLflow database without runs: making its tables takes seconds, copying it none."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def project(tmp_path, monkeypatch, tiny_model, texts, empty_database) -> Project:
    """A fresh project on the tiny model; the working folder is inside it."""
    root = tmp_path / "project"
    root.mkdir()
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copy(ROOT / "dvc.yaml", root / "dvc.yaml")
    shutil.copy(empty_database, root / "mlflow.db")
    monkeypatch.chdir(root)
    made = Project(root, tiny_model, texts)
    made.compose()
    return made
