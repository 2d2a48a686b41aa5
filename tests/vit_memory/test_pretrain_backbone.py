"""Pretraining that is killed ends as if it had not been; work of another recipe is not mistaken for it."""

import pytest
import torch

from stages.common.backbone import Backbone, BackboneConfig, build_vit
from stages.common.checkpoints import save_torch
from stages.common.drawings import Glyphs
from stages.common.mae import MaskedAutoencoder
from stages.vit_memory import pretrain_backbone
from stages.vit_memory.pretrain_backbone import BackboneParams, Params, nearest_mean_accuracy, pretrain, reconstruct

SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}


def test_a_killed_run_goes_on_to_the_same_weights(project, monkeypatch):
    monkeypatch.setattr(pretrain_backbone, "SAVE_EVERY", 3)
    params = Params.load("pretrain_backbone", variant="glyphs")
    params = params.model_copy(update={"steps": 7, "batch_size": 8, "masked_images": 4, "classes": 20})
    glyphs, device = Glyphs(20), torch.device("cpu")

    def student():
        config = BackboneConfig("vit_tiny_patch16_224", False, 32, SHAPE)
        torch.manual_seed(1)
        return Backbone(build_vit(config), config, "", {})

    whole, history = pretrain(student(), glyphs, project / "whole", device, **params.training())

    def save_and_die(path, value):
        save_torch(path, value)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(pretrain_backbone, "save_torch", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain(student(), glyphs, project / "killed", device, **params.training())
    assert (project / "killed/state.pt").is_file()
    other = student()
    torch.nn.init.zeros_(other.vit.cls_token)  # whatever it starts with, the saved state counts
    resumed, resumed_history = pretrain(other, glyphs, project / "killed", device, **params.training())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert history == resumed_history


def test_the_nearest_mean_is_right_where_classes_are_apart_and_chance_where_they_are_not():
    labels = torch.arange(400) % 4
    known = torch.arange(400) < 100
    x = torch.eye(8)[labels] + 0.05 * torch.randn(400, 8)
    assert nearest_mean_accuracy(x, labels, known) == 1
    assert abs(nearest_mean_accuracy(torch.randn(400, 8), labels, known) - 0.25) < 0.1


def test_what_all_images_share_does_not_hide_their_classes():
    labels, learn = torch.arange(200) % 2, torch.arange(200) < 50
    x = torch.stack([10.0 + labels, torch.zeros(200)], 1) + 0.1 * torch.randn(200, 2)
    assert nearest_mean_accuracy(x, labels, learn) == 1  # as directions from zero they are all the same


def test_a_reconstruction_leaves_what_is_seen_and_its_errors_are_of_what_is_not():
    torch.manual_seed(0)
    model = MaskedAutoencoder(build_vit(BackboneConfig("vit_tiny_patch16_224", False, 32, SHAPE))).eval()
    x = torch.randn(3, 3, 32, 32)
    rows, errors = reconstruct(model, x, 0.75, torch.Generator().manual_seed(1))
    assert list(rows) == ["seen", "filled in"]
    same, filled = (model.patchify(rows[name] - x).abs().amax(2) == 0 for name in rows)
    assert same.sum(1).tolist() == [4, 4, 4]  # of 16 patches
    assert torch.equal(same, filled)
    hidden = model.patchify(rows["filled in"] - x)[~filled].square().mean()
    assert errors["reconstruction_error"] == pytest.approx(hidden.item(), rel=1e-5)
    mean = model.patchify(x)[same].mean()
    assert errors["mean_pixel_error"] == pytest.approx(
        (model.patchify(x)[~same] - mean).square().mean().item(), rel=1e-5
    )


def test_contradictions_in_what_to_train_are_named():
    base = {"name": "vit_tiny_patch16_224", "image_size": 32}
    for values, message in (
        ({"pretrained": True, "shape": SHAPE}, "set shape to null"),
        ({"name": "facebook/vit-mae-base", "pretrained": False, "shape": None}, "set pretrained to true"),
    ):
        with pytest.raises(ValueError, match=message):
            BackboneParams(**base | values)
    assert BackboneParams(**base, pretrained=False, shape=SHAPE).config() == BackboneConfig(
        "vit_tiny_patch16_224", False, 32, SHAPE
    )
