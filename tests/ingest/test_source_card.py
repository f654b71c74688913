"""What a source says of its name and its terms goes with the model."""

import json
import os
import shutil
from pathlib import Path

import pytest

from quantline.errors import Failure, StageError
from quantline.ingest.source_card import LARGEST, METADATA, bring_card, read_card
from quantline.model.origin import Origin, is_legal, origin_of, read_origin

MODEL = Path("artifacts/model")
CARD = """\
---
license: other
license_name: mine-1.0
license_link: LICENSE.md
language:
- en
- no
- {x: y}
model_name: Mine
tags: [a]
---
# Mine
"""


def test_load_brings_the_terms_and_writes_down_what_the_card_says(project, tiny_model, tmp_path):
    source = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (source / "README.md").write_text(CARD)
    for name in ("LICENSE.md", "NOTICE", "USE_POLICY.md", "notes.txt"):
        (source / name).write_text(f"{name} of the source")
    project.compose(f"model.path={source}")
    project.stage("load")
    manifest = json.loads((MODEL / "manifest.json").read_text())
    assert manifest["card"] == {
        "license": "other",
        "license_name": "mine-1.0",
        "license_link": "LICENSE.md",
        "languages": ["en", "no"],
        "name": "Mine",
        "legal": ["LICENSE.md", "NOTICE", "USE_POLICY.md"],
    }
    assert manifest["chat_form"]["opening"] == "<|im_start|>assistant\n"
    assert (MODEL / "NOTICE").read_text() == "NOTICE of the source"
    assert "LICENSE.md" in manifest["files"]
    assert not {"README.md", "notes.txt"} & {path.name for path in MODEL.iterdir()}
    assert read_origin(MODEL).name == "Mine"


# Cards that say nothing that can be used → the keys under which something else is written.
USELESS = {
    "": [],
    "# No metadata": [],
    "---\n: [\n---\n": [METADATA],
    "---\n- a\n---\n": [METADATA],
    "---\nlicense: [mit]\nlanguage: 3\nmodel_name: {a: b}\n---\n": ["license"],
    f"---\nlicense: {'x' * 500}\n---\n": ["license"],
    '---\nlicense: "a\\u202eb"\n---\n': ["license"],
    "---\na: &a [x, x]\nlicense_link: *a\n---\n": ["license_link"],
}


@pytest.mark.parametrize("text", USELESS)
def test_read_card_takes_nothing_that_is_not_what_its_key_is_for(text):
    assert read_card(text) == ({}, USELESS[text])


def test_bring_card_says_which_terms_it_could_not_read(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: {a: b}\nmodel_name: Mine\n---\n")
    assert bring_card(source, tmp_path) == {"name": "Mine"}
    assert "a short line of text under license of the source's README.md" in capsys.readouterr().err


def test_bring_card_refuses_a_link_that_leads_out_of_the_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", source / "LICENSE")
    with pytest.raises(StageError) as caught:
        bring_card(source, tmp_path)
    assert caught.value.failure == Failure.PATH_ESCAPE


def test_bring_card_passes_over_what_is_no_text(tmp_path):
    source = tmp_path / "source"
    (source / "LICENSES").mkdir(parents=True)
    (source / "LICENSE").write_bytes(b"x" * (LARGEST + 1))
    (source / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff")
    assert bring_card(source, tmp_path) == {"license": "mit"}


def test_is_legal_knows_the_names_of_terms():
    legal = ["LICENSE", "license.txt", "LICENCE.md", "NOTICE", "COPYING", "USE_POLICY.md"]
    legal += ["LICENSE-MODEL", "Acceptable_Use_Policy.md", "THIRD_PARTY_NOTICES.txt"]
    assert all(is_legal(name) for name in legal)
    others = ["README.md", "license.py", "a/LICENSE", "config.json", "LICENSE.safetensors"]
    assert not any(is_legal(name) for name in others)


def test_origin_of_is_named_after_the_hub_the_card_or_the_folder():
    assert origin_of({"source": {"id": "you/mine", "revision": "abc"}}) == Origin(
        "mine", hub_id="you/mine", revision="abc"
    )
    assert origin_of({"source": {"path": "/a/b"}}).name == "b"
    assert origin_of({"source": {"path": "/a/b", "adapter": "/c/d"}}).name == "b-d"
    assert origin_of({"source": {"path": "/a/b"}, "card": {"name": "c"}}).name == "c"
