"""reference: the truth that variants are held against, and the texts that may not overlap."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.text.tokenizer import Tokenizer
from quantline.metrics import gold_set as gold


@pytest.fixture
def calibrated(project, tiny_model):
    """The project with artifacts/model and artifacts/calibration in place."""
    shutil.copytree(tiny_model, project.root / "artifacts/model")
    project.stage("calibrate")
    return project


@pytest.fixture(scope="module")
def whole(tiny_model):
    """whole(ids) → (final hidden states, log-probabilities) of the model as transformers runs it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()

    def run(ids):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor(np.asarray(ids, np.int64)[None])).last_hidden_state
            return hidden[0].numpy(), model.lm_head(hidden)[0].log_softmax(-1).numpy()

    return run


def refused(project, capsys, failure, words):
    with pytest.raises(SystemExit) as stop:
        project.stage("reference")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"({failure}): " in error and words in error
    assert project.events()[-1]["payload"]["failure"] == failure
    assert sorted(path.name for path in (project.root / "artifacts").iterdir()) == ["calibration", "model"]


def test_hidden_states_and_perplexity_are_those_of_the_whole_model(calibrated, whole, monkeypatch):
    from stages import reference

    monkeypatch.setattr(reference, "CHUNK_VALUES", 384 * 7)  # so that the chunks end within a sequence
    calibrated.stage("reference")
    folder = calibrated.root / "artifacts/reference"
    stored = load_file(folder / "hidden.safetensors")
    assert stored["hidden"].dtype == np.float32 and stored["hidden"].shape == (4, 64, 256)
    losses = []
    for hidden, ids in zip(stored["hidden"], stored["tokens"], strict=True):
        wanted, logprobs = whole(ids)
        assert np.abs(hidden - wanted).max() < 1e-5
        losses += [-logprobs[position, ids[position + 1]] for position in range(63)]
    info = json.loads((folder / "reference.json").read_text())
    assert info["perplexity"] == pytest.approx(np.exp(np.mean(losses, dtype=np.float64)), rel=1e-5)
    assert (info["tokens"], info["gold_items"], info["head"]) == (256, 9, "model.embed_tokens.weight")
    head = load_file(folder / "head.safetensors")["weight"].astype(np.float32)
    assert np.allclose((stored["hidden"][0] @ head.T)[:5].argmax(-1), whole(stored["tokens"][0])[1][:5].argmax(-1))


def test_a_head_with_a_bias(project, make_model, tmp_path):
    """Phi's: perplexity is the whole model's, and evaluate rebuilds the same logits from what is stored."""
    import torch
    from transformers import AutoModelForCausalLM

    from quantline.model.output_head import open_head

    source = make_model(tmp_path / "phi", "phi", num_key_value_heads=4, tie_word_embeddings=False)
    project.compose(f"model.path={source}")
    for name in ("load", "calibrate", "reference"):
        project.stage(name)
    folder = project.root / "artifacts/reference"
    stored, info = load_file(folder / "hidden.safetensors"), json.loads((folder / "reference.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.from_numpy(stored["tokens"]).long()
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.log_softmax(-1)
    assert info["perplexity"] == pytest.approx(float((-wanted[:, :-1].gather(2, ids[:, 1:, None])).mean().exp()), rel=1e-5)
    found = open_head(folder, info).logprobs(stored["hidden"].reshape(-1, 256)).reshape(wanted.shape)
    assert np.abs(found - wanted.numpy()).max() < 1e-4


def test_the_gold_set_is_tokenized_and_answered(calibrated, whole, tiny_model, texts):
    calibrated.stage("reference")
    folder = calibrated.root / "artifacts/reference"
    questions = gold.load_gold(texts / "gold.jsonl")
    items = gold.read_tokenized(folder / "gold.jsonl")
    baseline = json.loads((folder / "baseline.json").read_text())
    tokenizer = Tokenizer(tiny_model)
    for question, item, result in zip(questions, items, baseline, strict=True):
        assert item.prompt == tokenizer.prompt(question.prompt, question.chat)
        assert item.text == (tokenizer.render(question.chat, True) if question.chat else question.prompt)
        choices = question.choices or [question.answer]
        assert item.continuations == [tokenizer.encode(choice) for choice in choices]
        likelihoods, greedy = [], []
        for tokens in item.continuations:
            logprobs = whole(item.prompt + tokens)[1][len(item.prompt) - 1:-1]
            likelihoods.append(logprobs[np.arange(len(tokens)), tokens].mean())
            greedy.append((logprobs.argmax(-1) == tokens).all())
        assert result["likelihoods"] == pytest.approx(likelihoods, abs=1e-4)
        right = choices.index(question.answer)
        assert result["correct"] == (np.argmax(likelihoods) == right if question.choices else greedy[right])


def test_an_answer_is_generated_as_the_whole_model_does_token_by_token(calibrated, whole, tiny_model, tmp_path):
    items = [{"id": f"{n}-{most}", "prompt": prompt, "answer": "ada", "match": "contains", "max_tokens": most}
             for n, prompt in enumerate(("who met hugo by the river then?", "and where did rosa go?")) for most in (2, 5)]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    calibrated.compose(f"evaluation.gold={tmp_path / 'gold.jsonl'}")
    calibrated.stage("reference")
    tokenizer = Tokenizer(tiny_model)
    for item, found in zip(items, json.loads((calibrated.root / "artifacts/reference/baseline.json").read_text()), strict=True):
        ids = tokenizer.prompt(item["prompt"])
        begin, end = len(ids), tokenizer.special("eos_token")
        while len(ids) < begin + item["max_tokens"] and (token := int(whole(ids)[1][-1].argmax())) != end:
            ids.append(token)
        assert len(ids) > begin and found["said"] == tokenizer.decode(ids[begin:])


def test_without_a_gold_set(calibrated, capsys):
    calibrated.compose("evaluation.gold=null")
    calibrated.stage("reference")
    assert "no gold set" in capsys.readouterr().out
    assert json.loads((calibrated.root / "artifacts/reference/baseline.json").read_text()) == []


def test_reference_twice_gives_the_same_bytes(calibrated):
    def files():
        return {path.name: path.read_bytes() for path in (calibrated.root / "artifacts/reference").iterdir()}

    calibrated.stage("reference")
    first = files()
    calibrated.stage("reference")
    assert files() == first


def test_texts_that_share_a_document(calibrated, texts, capsys, tmp_path):
    shared = (texts / "calibration.txt").read_text().split("\n\n")[7]
    (tmp_path / "mixed.txt").write_text((texts / "evaluation.txt").read_text() + "\n\n" + shared)
    calibrated.compose(f"evaluation.path={tmp_path / 'mixed.txt'}")
    refused(calibrated, capsys, "texts_overlap", "share no document")
    assert calibrated.events()[-1]["reason_code"] == "reference_failed"


def test_a_gold_prompt_that_stands_in_the_evaluation_text(calibrated, texts, capsys, tmp_path):
    prompt = gold.load_gold(texts / "gold.jsonl")[2].prompt
    (tmp_path / "mixed.txt").write_text((texts / "evaluation.txt").read_text() + f"\n\n{prompt} Ada.")
    calibrated.compose(f"evaluation.path={tmp_path / 'mixed.txt'}")
    refused(calibrated, capsys, "texts_overlap", "open-2")


def test_one_text_for_both_overlaps_unless_it_is_parted(calibrated, texts, capsys):
    path = texts / "calibration.txt"
    calibrated.compose(f"evaluation.path={path}")
    refused(calibrated, capsys, "texts_overlap", "share no document")
    calibrated.compose(f"evaluation.path={path}", "calibration.part=[0.0,0.5]", "evaluation.part=[0.5,1.0]")
    calibrated.stage("calibrate")
    calibrated.stage("reference")


def test_a_calibration_text_that_changed_since(calibrated, texts, capsys, tmp_path):
    (tmp_path / "other.txt").write_text((texts / "calibration.txt").read_text() + "\n\nand more")
    calibrated.compose(f"calibration.path={tmp_path / 'other.txt'}")
    refused(calibrated, capsys, "artifact_changed", "run calibrate again")


def test_a_bad_gold_set(calibrated, capsys, tmp_path):
    (tmp_path / "gold.jsonl").write_text('{"id": "a", "prompt": "p", "answer": "x"}\n{"id": "b"}\n')
    calibrated.compose(f"evaluation.gold={tmp_path / 'gold.jsonl'}")
    refused(calibrated, capsys, "dataset_invalid", "line 2")
