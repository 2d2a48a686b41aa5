"""The functional ViT is timm's, and its masked autoencoder is the module."""

import pytest
import torch
from tiny_vit import CONFIG, SHAPE, SIDE, TEST, autoencoder
from torch import Tensor

from stages.common.backbone import load_backbone, save_backbone
from stages.common.mae import MaskedAutoencoder
from stages.recall.functional_vit import Weights, encode, load_base, reconstruct

PATCHES = 16


def split(model: MaskedAutoencoder) -> tuple[Weights, Weights]:
    """The weights of the encoder and those of the decoder."""
    state = model.state_dict()
    return model.vit.state_dict(), {k: v for k, v in state.items() if not k.startswith("vit.")}


def assert_near(a: Tensor, b: Tensor, tolerance=1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_the_functional_vit_computes_what_timm_s_does():
    vit = autoencoder().vit.double()
    x = torch.randn(3, 3, SIDE, SIDE).double()
    patches = MaskedAutoencoder(vit).patchify(x)
    assert_near(encode(vit.state_dict(), patches, SHAPE["num_heads"]), vit.forward_features(x), 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.75])
def test_of_the_patches_seen_it_computes_what_the_masked_autoencoder_encodes(ratio):
    model, encoded = autoencoder().double(), {}
    model.embed.register_forward_hook(lambda _module, inputs, _output: encoded.update(tokens=inputs[0]))
    x, noise = torch.randn(3, 3, SIDE, SIDE).double(), torch.rand(3, PATCHES)
    _, hidden = model(x, noise, ratio)
    seen = noise.argsort(1)[:, : int((~hidden[0]).sum())]
    assert not hidden.gather(1, seen).any()
    encoder, _ = split(model)
    assert_near(encode(encoder, model.patchify(x), SHAPE["num_heads"], seen), encoded["tokens"], 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_it_fills_in_what_the_masked_autoencoder_does_trained_or_not(spread, ratio):
    model = autoencoder(spread)
    x, noise = torch.randn(3, 3, SIDE, SIDE), torch.rand(3, PATCHES)
    filled, hidden = reconstruct(*split(model), model.patchify(x), SHAPE["num_heads"], noise, ratio)
    expected, expected_hidden = model(x, noise, ratio)
    assert torch.equal(hidden, expected_hidden)
    assert_near(filled, expected)


@pytest.mark.parametrize(("channels", "side"), [(1, SIDE), (3, SIDE), (1, 10), (3, 40)])
def test_a_base_sees_images_as_its_backbone_does(tmp_path, channels, side):
    model, path = autoencoder(), tmp_path / "backbone.safetensors"
    save_backbone(path, model.vit, CONFIG, split(model)[1])
    base, backbone = load_base(path), load_backbone(path)
    pixels = torch.randint(256, (5, channels, side, side), dtype=torch.uint8)
    patches, prepared = base.patchify(pixels), backbone.prepare(pixels)
    assert_near(patches, model.patchify(prepared))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
    assert_near(base.unpatchify(patches), prepared * std + mean)
    if side == SIDE:
        assert_near(base.unpatchify(patches), (pixels.float() / 255).expand(-1, 3, -1, -1))


@torch.no_grad()
def test_a_base_has_the_features_and_the_decoder_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTLENS_PRECISION", "float32")
    model, path = autoencoder(), tmp_path / "backbone.safetensors"
    save_backbone(path, model.vit, CONFIG, split(model)[1])
    base, backbone = load_base(path), load_backbone(path)
    tokens = encode(base.encoder, base.patchify(TEST.images), base.heads)
    assert_near(torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], 1), backbone.features(TEST.images))
    assert base.decoder.keys() == backbone.decoder.keys() and len(base.decoder) > 10
    assert all(torch.equal(base.decoder[name], tensor) for name, tensor in backbone.decoder.items())
    assert base.patches == PATCHES
