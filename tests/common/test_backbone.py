"""Backbones: the mapping from ViT-MAE, masked autoencoding, files, and no silent substitute for published weights."""

import copy
from dataclasses import replace

import pytest
import timm
import torch

from stages.common import backbone
from stages.common.backbone import Backbone, BackboneConfig, as_autoencoder, build_vit, load_backbone, save_backbone
from stages.common.drawings import Glyphs
from stages.common.files import load_metadata
from stages.common.mae import MaskedAutoencoder, mae_to_decoder, mae_to_timm, vit_of_mae
from stages.common.randomness import generator
from stages.common.stage import InputError

SHAPE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
CONFIG = BackboneConfig("vit_tiny_patch16_224", False, 32, SHAPE)


def decoder_of(autoencoder: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in autoencoder.state_dict().items() if not name.startswith("vit.")}


@pytest.mark.parametrize("epsilon", [1e-12, 1e-2])
def test_a_vit_mae_computes_the_same_as_a_timm_vit(epsilon, tmp_path, monkeypatch):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
        mask_ratio=0.0, layer_norm_eps=epsilon,
    )  # fmt: skip
    reference = ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn_like(p)
    vit = vit_of_mae(config.to_dict()).eval()
    vit.load_state_dict(mae_to_timm(reference.state_dict()), strict=True)
    x, ascending = torch.randn(3, 3, 32, 32), torch.arange(16.0).expand(3, -1)
    with torch.no_grad():
        expected = reference.vit(x, noise=ascending).last_hidden_state
        torch.testing.assert_close(vit.forward_features(x), expected, rtol=1e-4, atol=1e-5)
    reference.save_pretrained(tmp_path)  # spells its names as the hub's files do
    monkeypatch.setattr(backbone, "hf_hub_download", lambda _repository, file: tmp_path / file)
    read = build_vit(BackboneConfig("somebody/vit-mae", True, 32, None)).eval()
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in vit.state_dict().items())
    with torch.no_grad():
        assert torch.equal(read(x), vit(x))  # the same epsilon
    with pytest.raises(InputError, match="reads images of 32 pixels, not 224"):
        build_vit(BackboneConfig("somebody/vit-mae", True, 224, None))


def test_a_vit_mae_fills_in_the_same_as_a_masked_autoencoder():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=128,
        mask_ratio=0.75, layer_norm_eps=1e-6, qkv_bias=False,
    )  # fmt: skip
    reference = ViTMAEForPreTraining(config).eval()
    reference.decoder.decoder_norm.eps = 1e-5
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn_like(p)
    state = reference.state_dict()
    decoder = mae_to_decoder(state, 8)
    vit = build_vit(replace(CONFIG, shape=SHAPE | {"mlp_ratio": 2, "qkv_bias": False}))
    vit.load_state_dict(mae_to_timm(state), strict=True)
    model = as_autoencoder(Backbone(vit, CONFIG, "", decoder))
    x, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        expected, (predicted, hidden) = reference(x, noise=noise), model(x, noise, 0.75)
        torch.testing.assert_close(model.loss(x, noise, 0.75), expected.loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(hidden.float(), expected.mask)
    same_order = model.patchify(reference.unpatchify(expected.logits))
    torch.testing.assert_close(predicted, same_order, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predicted, expected.logits, atol=0.1)  # the orders do differ


def test_an_autoencoder_sees_only_what_is_not_hidden():
    model = MaskedAutoencoder(build_vit(CONFIG)).eval()
    x, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    predicted, hidden = model(x, noise, 0.75)
    assert hidden.sum(1).tolist() == [12, 12]
    assert noise[hidden].min() > 0
    assert all(n[h].min() > n[~h].max() for n, h in zip(noise, hidden, strict=True))
    changed = torch.where(hidden[..., None], torch.randn(2, 16, 192), model.patchify(x))
    torch.testing.assert_close(model(model.unpatchify(changed), noise, 0.75)[0], predicted)
    seen = torch.where(hidden[..., None], model.patchify(x), torch.randn(2, 16, 192))
    assert not torch.allclose(model(model.unpatchify(seen), noise, 0.75)[0], predicted)


def test_the_encoder_is_the_vit_where_nothing_is_hidden():
    model = MaskedAutoencoder(build_vit(CONFIG)).eval()
    x = torch.randn(2, 3, 32, 32)
    encoded = {}
    model.embed.register_forward_hook(lambda _module, inputs, _output: encoded.update(tokens=inputs[0]))
    model(x, torch.arange(16.0).expand(2, -1), 0.0)
    torch.testing.assert_close(encoded["tokens"], model.vit.forward_features(x))


def test_patches_are_the_image_and_in_the_order_of_the_tokens():
    model = MaskedAutoencoder(build_vit(CONFIG))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.unpatchify(model.patchify(x)), x)
    weight = model.vit.patch_embed.proj.weight  # [d, 3, s, s]
    tokens = model.patchify(x) @ weight.flatten(1).T + model.vit.patch_embed.proj.bias
    torch.testing.assert_close(tokens, model.vit.patch_embed(x), rtol=1e-4, atol=1e-5)


def test_a_file_gives_back_the_weights_and_says_whose_they_are(tmp_path):
    path, vit = tmp_path / "backbone.safetensors", build_vit(CONFIG)
    decoder = decoder_of(MaskedAutoencoder(vit))
    save_backbone(path, vit, CONFIG, decoder)
    stored = load_backbone(path)
    assert stored.config == CONFIG
    assert all(
        torch.equal(tensor.half().float(), stored.vit.state_dict()[name]) for name, tensor in vit.state_dict().items()
    )
    assert all(torch.equal(decoder[k].half().float(), v) for k, v in decoder_of(as_autoencoder(stored)).items())
    images = Glyphs(3).draw(torch.arange(3), 32, generator(0, "test"))
    again = load_backbone(path)
    assert torch.equal(stored.features(images), again.features(images))
    assert load_metadata(path)["sha256"] == stored.sha256 == again.sha256


def test_a_missing_file_says_what_makes_it(project):
    for path, stage in (
        ("pretrain_backbone/glyphs", "pretrain_backbone@glyphs"),
        ("train_mae/glyphs", "train_mae@glyphs"),
    ):
        with pytest.raises(InputError, match=f"is missing: run 'dvc repro {stage}'$"):
            load_backbone(project.relative_to(project) / "models" / path / "backbone.safetensors")


def test_of_published_weights_name_and_hash_are_stored_and_others_are_refused(tmp_path, monkeypatch):
    path, vit = tmp_path / "backbone.safetensors", build_vit(CONFIG)
    config = BackboneConfig("published", True, 32, None)
    save_backbone(path, vit, config, {})
    assert path.stat().st_size < 2000
    monkeypatch.setattr(backbone, "build_vit", lambda _config: copy.deepcopy(vit))
    assert load_backbone(path).config == config
    with torch.no_grad():
        vit.cls_token += 1
    with pytest.raises(InputError, match="are not those it was made with"):
        load_backbone(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", "cannot be read"),
        ("facebook/vit-mae-base", "cannot be read"),
        ("vit_of_nobody", "timm has no model"),
        ("vit_base_patch16_plus_240", "timm has no weights"),
    ],
)
def test_published_weights_that_cannot_be_had_are_an_error(name, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=message):
        build_vit(BackboneConfig(name, True, 224, None))


def test_images_of_any_size_and_channels_become_what_the_vit_reads():
    model = Backbone(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **SHAPE), CONFIG, "", {})
    grey = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    x = model.prepare(grey)
    assert x.shape == (4, 3, 32, 32)
    assert torch.equal(x[:, 0], x[:, 2])
    assert torch.equal(x, model.prepare(grey.expand(-1, 3, -1, -1)))
    exact = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.prepare(exact), (exact.float() / 255 - 0.5) / 0.25)
    assert model.features(exact).shape == (4, 2, 32)


def test_glyphs_are_the_same_for_a_seed_and_differ_between_classes_more_than_within():
    few, many = Glyphs(20, seed=3), Glyphs(40, seed=3)
    assert torch.equal(few.control, many.control[:20])
    labels = torch.arange(20).repeat_interleave(10)
    images = few.draw(labels, 16, generator(0, "glyphs"))
    assert images.dtype == torch.uint8
    assert torch.equal(images, few.draw(labels, 16, generator(0, "glyphs")))
    x = images.flatten(1).float()
    distance, same = torch.cdist(x, x), labels[:, None] == labels
    assert distance[same].mean() < 0.8 * distance[~same].mean()
    assert (images.flatten(1).amax(1) > 100).all()
