"""A memory is saved with its ViT, and loaded elsewhere as it was."""

import json
from pathlib import Path

import pytest
import torch
from reproduction import ROOT

from stages.vit_memory.models import MemoryAugmentedViT

BACKBONE = ROOT / "models/released/backbone.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryAugmentedViT, Path]:
    """A model that has memorised a few images, and the folder that it was saved in."""
    model = MemoryAugmentedViT(str(BACKBONE), num_classes=4, mem_size=12, beta=8.0, memory_blocks=(-1, 0)).eval()
    model.memorise(torch.randn(8, 3, 32, 32), torch.arange(4).repeat(2))
    for block in model.memory_blocks:
        block.gate.data.uniform_(0.5, 1)
    folder = tmp_path_factory.mktemp("hub")
    model.save_pretrained(folder)
    return model, folder


def test_what_is_loaded_answers_as_what_was_saved_to_the_bit(saved, tmp_path, monkeypatch):
    model, folder = saved
    monkeypatch.chdir(tmp_path)  # where there is no backbone
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = MemoryAugmentedViT.from_pretrained(folder)
    x = torch.randn(5, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    model.forget(1)
    loaded.forget(1)
    assert torch.equal(loaded(x), model(x))


def test_what_is_saved_names_no_path_of_this_machine(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone_name"]["name"] == "vit_tiny_patch16_224"
    assert config["backbone_name"]["shape"]["embed_dim"] == 64
    assert config["mem_size"] == 12
    assert str(ROOT) not in (folder / "config.json").read_text()
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "README.md"}


def test_a_vit_that_came_as_an_object_cannot_be_written_down(tmp_path):
    vit = MemoryAugmentedViT(str(BACKBONE), num_classes=4).vit
    vit.blocks[-1] = vit.blocks[-1].block
    with pytest.raises(ValueError, match="pass a BackboneConfig"):
        MemoryAugmentedViT(vit, num_classes=4).save_pretrained(tmp_path)


def test_weights_that_lack_some_are_refused(saved, tmp_path):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text()) | {"memory_blocks": [-1, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match="Missing key"):
        MemoryAugmentedViT.from_pretrained(tmp_path)


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="expected what save_pretrained wrote"):
        MemoryAugmentedViT.from_pretrained(tmp_path)
