"""reference: the truth that variants are measured by, and the texts that may not overlap."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.metrics import baseline
from quantline.metrics.gold_items import load_gold
from quantline.metrics.gold_set import read_tokenized
from quantline.model.output_head import open_head
from quantline.model.read_architecture import architecture_of_folder
from quantline.text.tokenizer import Tokenizer
from tests.helpers.models import place_model


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """Where the calibration is kept for the other tests."""
    return tmp_path_factory.mktemp("calibrated") / "artifacts"


@pytest.fixture
def calibrated(project, tiny_model, artifacts):
    """The project with artifacts/model and artifacts/calibration in place."""
    if artifacts.exists():
        shutil.copytree(artifacts, project.root / "artifacts")
        return project
    place_model(tiny_model, project.root / "artifacts/model")
    project.stage("calibrate")
    shutil.copytree(project.root / "artifacts", artifacts)
    return project


@pytest.fixture(scope="module")
def full_model(tiny_model):
    """full_model(ids) → (final hidden states, log-probabilities) as transformers computes them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def run(ids):
        with torch.no_grad():
            inputs = torch.tensor(np.asarray(ids, np.int64)[None])
            hidden = model.model(input_ids=inputs).last_hidden_state
            return hidden[0].numpy(), model.lm_head(hidden)[0].log_softmax(-1).numpy()

    return run


def refuse(project, capsys, failure: str, words: str) -> None:
    """Check that the stage fails by that name, with those words, and leaves nothing."""
    with pytest.raises(SystemExit) as stop:
        project.stage("reference")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"({failure}): " in error and words in error
    assert project.events()[-1]["payload"]["failure"] == failure
    left = sorted(path.name for path in (project.root / "artifacts").iterdir())
    assert left == ["calibration", "model"]


def test_reference_has_the_hidden_states_and_perplexity_of_the_full_model(
    calibrated, full_model, monkeypatch
):
    monkeypatch.setattr(baseline, "CHUNK_VALUES", 384 * 7)  # so that chunks end within a sequence
    calibrated.stage("reference")
    folder = calibrated.root / "artifacts/reference"
    stored = load_file(folder / "hidden.safetensors")
    assert stored["hidden"].dtype == np.float32
    assert stored["hidden"].shape == (4, 64, 256)
    losses = []
    for hidden, ids in zip(stored["hidden"], stored["tokens"], strict=True):
        expected, logprobs = full_model(ids)
        assert np.abs(hidden - expected).max() < 1e-5
        losses += [-logprobs[position, ids[position + 1]] for position in range(63)]
    info = json.loads((folder / "reference.json").read_text())
    perplexity = np.exp(np.mean(losses, dtype=np.float64))
    assert info["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert info["tokens"] == 256
    assert info["gold_items"] == 9
    assert info["head"] == "model.embed_tokens.weight"
    head = load_file(folder / "head.safetensors")["weight"].astype(np.float32)
    top = (stored["hidden"][0] @ head.T)[:5].argmax(-1)
    expected_top = full_model(stored["tokens"][0])[1][:5].argmax(-1)
    assert np.allclose(top, expected_top)


def test_reference_of_a_head_with_a_bias(project, make_model, tmp_path):
    """Phi's: perplexity is the full model's, and its logits are rebuilt from what is stored."""
    import torch
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "phi", "phi", num_key_value_heads=4, tie_word_embeddings=False)
    project.compose(f"model.path={source}")
    for name in ("load", "calibrate", "reference"):
        project.stage(name)
    folder = project.root / "artifacts/reference"
    stored = load_file(folder / "hidden.safetensors")
    info = json.loads((folder / "reference.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.from_numpy(stored["tokens"]).long()
    with torch.no_grad():
        expected = model(input_ids=ids).logits.log_softmax(-1)
    losses = -expected[:, :-1].gather(2, ids[:, 1:, None])
    assert info["perplexity"] == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    head = open_head(folder, info)
    logprobs = head.logprobs(stored["hidden"].reshape(-1, 256)).reshape(expected.shape)
    assert np.abs(logprobs - expected.numpy()).max() < 1e-4


def test_reference_tokenizes_and_answers_the_gold_set(calibrated, full_model, tiny_model, texts):
    calibrated.stage("reference")
    folder = calibrated.root / "artifacts/reference"
    questions = load_gold(texts / "gold.jsonl")
    items = read_tokenized(folder / "gold.jsonl")
    answers = json.loads((folder / "baseline.json").read_text())
    tokenizer = Tokenizer(tiny_model)
    assert len(questions) == 9
    for question, item, answer in zip(questions, items, answers, strict=True):
        text = tokenizer.render(question.chat, True) if question.chat else question.prompt
        assert item.text == text
        # White space at the prompt's end belongs to what follows.
        assert item.prompt == tokenizer.encode(text.rstrip())
        choices = question.choices or [question.answer]
        whole = [tokenizer.encode(text + choice) for choice in choices]
        assert [item.prompt + tokens for tokens in item.continuations] == whole
        likelihoods = []
        greedy = []
        for tokens in item.continuations:
            logprobs = full_model(item.prompt + tokens)[1][len(item.prompt) - 1 : -1]
            likelihoods.append(logprobs[np.arange(len(tokens)), tokens].mean())
            greedy.append((logprobs.argmax(-1) == tokens).all())
        assert answer["likelihoods"] == pytest.approx(likelihoods, abs=1e-4)
        right = choices.index(question.answer)
        expected = np.argmax(likelihoods) == right if question.choices else greedy[right]
        assert answer["correct"] == expected


def test_reference_generates_answers_as_the_full_model_does_token_by_token(
    calibrated, full_model, tiny_model, tmp_path
):
    items = []
    for number, prompt in enumerate(("who met hugo by the river then?", "and where did rosa go?")):
        for most in (2, 5):
            items.append(
                {
                    "id": f"{number}-{most}",
                    "prompt": prompt,
                    "answer": "ada",
                    "match": "contains",
                    "max_tokens": most,
                }
            )
    path = tmp_path / "gold.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    calibrated.compose(f"evaluation.gold={path}")
    calibrated.stage("reference")
    tokenizer = Tokenizer(tiny_model)
    folder = calibrated.root / "artifacts/reference"
    answers = json.loads((folder / "baseline.json").read_text())
    end = tokenizer.special("eos_token")
    for item, answer in zip(items, answers, strict=True):
        ids = tokenizer.prompt(item["prompt"])
        begin = len(ids)
        while len(ids) < begin + item["max_tokens"]:
            token = int(full_model(ids)[1][-1].argmax())
            if token == end:
                break
            ids.append(token)
        assert len(ids) > begin
        assert answer["said"] == tokenizer.decode(ids[begin:])


def test_reference_without_a_gold_set(calibrated, capsys):
    calibrated.compose("evaluation.gold=null")
    calibrated.stage("reference")
    assert "no gold set" in capsys.readouterr().out
    path = calibrated.root / "artifacts/reference/baseline.json"
    assert json.loads(path.read_text()) == []


def test_reference_says_what_the_model_is_for_those_who_do_not_have_it(calibrated):
    calibrated.stage("reference")
    artifacts = calibrated.root / "artifacts"
    described = architecture_of_folder(artifacts / "reference")
    assert described == architecture_of_folder(artifacts / "model")


def test_reference_twice_gives_the_same_bytes(calibrated):
    def files() -> dict[str, bytes]:
        folder = calibrated.root / "artifacts/reference"
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    calibrated.stage("reference")
    first = files()
    assert len(first) == 7
    calibrated.stage("reference")
    assert files() == first


def test_reference_refuses_texts_that_share_a_document(calibrated, texts, capsys, tmp_path):
    shared = (texts / "calibration.txt").read_text().split("\n\n")[7]
    evaluation = (texts / "evaluation.txt").read_text()
    (tmp_path / "mixed.txt").write_text(f"{evaluation}\n\n{shared}")
    calibrated.compose(f"evaluation.path={tmp_path / 'mixed.txt'}")
    refuse(calibrated, capsys, "texts_overlap", "stand in the calibration text")
    assert calibrated.events()[-1]["reason_code"] == "reference_failed"


def test_reference_refuses_a_gold_prompt_of_the_calibration_text_unless_it_is_allowed(
    calibrated, texts, capsys, tmp_path
):
    words = (texts / "calibration.txt").read_text().split()
    lines = (texts / "gold.jsonl").read_text().splitlines()
    seen = {"id": "seen", "prompt": " ".join(words[3:20]), "answer": " ada"}
    (tmp_path / "gold.jsonl").write_text("\n".join([*lines, json.dumps(seen)]))
    gold = f"evaluation.gold={tmp_path / 'gold.jsonl'}"
    calibrated.compose(gold)
    refuse(calibrated, capsys, "texts_overlap", "seen")
    calibrated.compose(gold, "evaluation.allow_overlap=[seen]")
    calibrated.stage("reference")
    info = json.loads((calibrated.root / "artifacts/reference/reference.json").read_text())
    assert info["allowed_overlaps"] == ["seen"]


def test_reference_refuses_one_text_for_both_unless_it_is_parted(calibrated, texts, capsys):
    path = texts / "calibration.txt"
    calibrated.compose(f"evaluation.path={path}")
    refuse(calibrated, capsys, "texts_overlap", "stand in the calibration text")
    calibrated.compose(
        f"evaluation.path={path}", "calibration.part=[0.0,0.5]", "evaluation.part=[0.5,1.0]"
    )
    calibrated.stage("calibrate")
    calibrated.stage("reference")


def test_reference_refuses_a_calibration_text_that_changed_since(
    calibrated, texts, capsys, tmp_path
):
    calibration = (texts / "calibration.txt").read_text()
    (tmp_path / "other.txt").write_text(f"{calibration}\n\nand more")
    calibrated.compose(f"calibration.path={tmp_path / 'other.txt'}")
    refuse(calibrated, capsys, "artifact_changed", "run calibrate again")


def test_reference_refuses_a_bad_gold_set(calibrated, capsys, tmp_path):
    path = tmp_path / "gold.jsonl"
    path.write_text('{"id": "a", "prompt": "p", "answer": "x"}\n{"id": "b"}\n')
    calibrated.compose(f"evaluation.gold={path}")
    refuse(calibrated, capsys, "dataset_invalid", "line 2")
