"""One tiny model folder for tests of what stands on models: an untrained Llama of the scene language and a tiny FSQ."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def scene_model(tmp_path_factory):
    """Path of a model folder that knows the words of scenes and draws 16 x 16 pictures with untrained weights."""
    from unitok import weights
    from unitok.data.render import Template
    from unitok.lm.expand import expand_folder
    from unitok.tokenizers.fsq import FSQTokenizer

    out = tmp_path_factory.mktemp("scene_model")
    small = {**weights.LLAMA, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "LLAMA", small)
        weights.write_llm(out / "llm")
    FSQTokenizer.tiny().save_pretrained(out / "tokenizer")
    template = Template(**weights.TEMPLATE).to_dict()
    return expand_folder(out / "llm", out / "tokenizer", out / "model", weights.NAME, template=template)
