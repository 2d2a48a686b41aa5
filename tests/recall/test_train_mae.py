"""Masked autoencoders: patches know their place, timm's names compute the same, training is resumable and of use."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from running import start
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from stages.common import backbone
from stages.common.backbone import Backbone, BackboneConfig, as_autoencoder, load_backbone, read_vit_mae
from stages.common.checkpoints import save_torch
from stages.common.drawings import Shapes
from stages.common.images import load_images
from stages.common.mae import MaskedAutoencoder, mae_to_decoder, mae_to_timm, vit_of_mae
from stages.common.randomness import generator
from stages.common.stage import InputError
from stages.datasets import fetch_data
from stages.recall import train_mae
from stages.recall.pools import POOLS, pool
from stages.recall.train_mae import (
    Params,
    build_mae,
    masked_errors,
    normalisation,
    position_spread,
    shape_of,
    visible_mean,
)
from stages.vit_memory.models import MemoryAugmentedViT

CPU = torch.device("cpu")


@pytest.fixture
def params(project) -> Params:
    assert project
    return Params.load("train_mae", "shapes").model_copy(update={"dim": 16, "depth": 1, "batch_size": 16, "steps": 7})


def drawn(n: int, purpose: str) -> torch.Tensor:
    """Shapes as an autoencoder reads them: float [n, 3, 16, 16]."""
    images = Shapes().draw(torch.arange(n) % 8, 16, generator(0, purpose))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in normalisation(images))
    return (images / 255 - mean) / std


def test_patches_know_their_place_and_training_does_not_change_it(params, tmp_path):
    model = build_mae(params.config(), params.seed)
    before = [p.clone() for p in positions(model)]
    assert min(position_spread(model)) > 0.1
    for p in before:
        distances = torch.cdist(p[0], p[0]) + torch.eye(p.shape[1])
        assert distances.min() > 0.1
    train_mae.train_mae(model, drawn(64, "train"), drawn(16, "validation"), tmp_path, **params.training())
    assert all(torch.equal(a, b) for a, b in zip(before, positions(model), strict=True))
    assert position_spread(ViTMAEForPreTraining(model.config)) == (0, 0)  # what is mended here


def positions(model: ViTMAEForPreTraining) -> list[torch.Tensor]:
    return [model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed]


@pytest.mark.parametrize("steps", [0, 5])
def test_under_timms_names_it_computes_the_same(params, tmp_path, steps):
    mae = build_mae(params.config(), params.seed)
    if steps:
        params = params.model_copy(update={"steps": steps, "learning_rate": 0.02})
        train_mae.train_mae(mae, drawn(64, "train"), drawn(16, "validation"), tmp_path, **params.training())
    vit = vit_of_mae(mae.config.to_dict())
    vit.load_state_dict(mae_to_timm(mae.state_dict()))
    config = BackboneConfig(train_mae.PLAIN_VIT, False, params.image_size, shape_of(vit))
    model = as_autoencoder(Backbone(vit, config, "", mae_to_decoder(mae.state_dict(), params.patch_size)))
    x, noise = drawn(5, "test"), torch.rand(5, 16)
    with torch.no_grad():
        expected, (predicted, hidden) = mae.eval()(pixel_values=x, noise=noise), model(x, noise, params.mask_ratio)
        mae.vit.config.mask_ratio = 0.0
        features = mae.vit(pixel_values=x, noise=torch.arange(16.0).expand(5, -1)).last_hidden_state
        torch.testing.assert_close(vit.forward_features(x), features, rtol=1e-5, atol=1e-5)
    assert torch.equal(hidden.float(), expected.mask)
    filled_in = mae.unpatchify(expected.logits)
    torch.testing.assert_close(model.unpatchify(predicted), filled_in, rtol=1e-5, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bytes(project, monkeypatch):
    monkeypatch.setattr(train_mae, "SAVE_EVERY", 3)
    monkeypatch.setattr(train_mae, "LOG_EVERY", 2)
    start(monkeypatch, fetch_data, dataset="shapes")
    set_params(steps=7)
    start(monkeypatch, train_mae, dataset="shapes")
    written = [path for folder in ("models", "reports") for path in (project / folder).rglob("*.*")]
    whole = [path.read_bytes() for path in written]
    assert len(whole) == 4
    shutil.rmtree(project / "models")

    def save_and_die(path, value):
        save_torch(path, value)
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(train_mae, "save_torch", save_and_die)
        start(monkeypatch, train_mae, dataset="shapes")
    assert not (project / "models").exists()
    (state,) = (project / ".work").rglob("state.pt")
    before = torch.load(state, weights_only=True)
    assert before["step"] == 3
    started_at = []
    monkeypatch.setattr(train_mae, "tqdm", lambda steps, *_, **__: started_at.append(steps[0]) or steps)
    start(monkeypatch, train_mae, dataset="shapes")
    assert started_at == [3]
    assert [path.read_bytes() for path in written] == whole
    assert not state.exists()


def test_guesses_without_a_network_are_what_they_say(params):
    model = MaskedAutoencoder(vit_of_mae(build_mae(params.config(), params.seed).config.to_dict())).eval()
    x, noise = drawn(600, "test"), torch.rand(600, 16)
    hidden = model(x, noise, 0.75)[1]
    errors = masked_errors(model, x, noise, x.mean(0, keepdim=True), 0.75)
    pixels = hidden.view(600, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(x)
    expected = (x - x.mean(0)).square()[pixels].double().mean().item()
    assert errors["mean_image"] == pytest.approx(expected, rel=1e-5)
    seen = torch.where(pixels, torch.nan, x)
    colour = seen.nanmean((2, 3), keepdim=True)
    torch.testing.assert_close(
        model.unpatchify(visible_mean(model.patchify(x), hidden).expand(-1, 16, -1)), colour.expand_as(x)
    )
    assert errors["visible_mean"] == pytest.approx((x - colour).square()[pixels].double().mean().item(), rel=1e-5)


def set_params(**values: object) -> None:
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text())
    params["train_mae"] |= values
    path.write_text(yaml.safe_dump(params))


def test_training_beats_both_guesses_and_vit_memory_reads_the_file(project, monkeypatch):
    start(monkeypatch, fetch_data, dataset="shapes")
    set_params(steps=300)
    start(monkeypatch, train_mae, dataset="shapes")
    errors = json.loads((project / "reports/train_mae/shapes/summary.json").read_text())["masked_error"]
    assert errors["autoencoder"] < 0.95 * errors["mean_image"] < errors["visible_mean"]
    path = project / "models/train_mae/shapes/backbone.safetensors"
    stored = load_backbone(path)
    assert stored.config.shape == {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    images = load_images("shapes", CPU)[1].images[:20]
    x = stored.prepare(images)
    assert x.mean((0, 2, 3)).abs().max() < 0.2
    memory = MemoryAugmentedViT(str(path), num_classes=8, hopfield_position="after_ffn").eval()
    assert memory(x).shape == (20, 8)


def test_only_the_base_pool_is_learnt_from(project, monkeypatch):
    start(monkeypatch, fetch_data, dataset="shapes")
    set_params(steps=1)
    seen = []
    monkeypatch.setattr(
        train_mae,
        "train_mae",
        lambda _model, train, validation, *_, **__: seen.extend([train, validation]) or [{"step": 1}],
    )
    start(monkeypatch, train_mae, dataset="shapes")
    images = load_images("shapes", CPU)[0]
    stored = load_backbone(project / "models/train_mae/shapes/backbone.safetensors")
    used = set(map(bytes, torch.cat(seen).numpy()))
    pools = {name: set(map(bytes, stored.prepare(pool(images, name).images).numpy())) for name in POOLS}
    assert len(seen[1]) == 20
    assert used == pools["base"]
    assert not used & (pools["train"] | pools["test"])


def test_a_published_encoder_is_stored_whole_and_nothing_is_trained(project, tmp_path, monkeypatch):
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=32,
        layer_norm_eps=1e-12,
    )  # fmt: skip
    reference = ViTMAEForPreTraining(config)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn_like(p)
    reference.save_pretrained(tmp_path / "hub")
    start(monkeypatch, fetch_data, dataset="shapes")
    set_params(published="somebody/vit-mae", image_size=32, patch_size=8)
    with monkeypatch.context() as connected:
        connected.setattr(backbone, "hf_hub_download", lambda _repository, file: tmp_path / "hub" / file)
        expected = read_vit_mae("somebody/vit-mae", 32).eval()
        start(monkeypatch, train_mae, dataset="shapes")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    stored = load_backbone(project / "models/train_mae/shapes/backbone.safetensors")  # needs no network
    assert not stored.decoder
    state = stored.vit.state_dict()
    assert all(torch.equal(tensor.half().float(), state[name]) for name, tensor in expected.state_dict().items())
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(stored.vit.forward_features(x), expected.forward_features(x), rtol=0.01, atol=0.01)
    with pytest.raises(InputError, match=r"^the published weights of 'somebody/vit-mae' cannot be read[^\n]*$"):
        start(monkeypatch, train_mae, dataset="shapes")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 5}, "train_mae.patch_size: Value error, patches of 5 pixels do not tile images of 16"),
        ({"dim": 30}, "train_mae.dim: Input should be a multiple of 4"),
        ({"heads": 3}, "train_mae.heads: Value error, 3 heads do not divide dim 32"),
        ({"mask_ratio": 0.7}, "train_mae.mask_ratio: Value error, of 16 patches it leaves 4.80 to be seen"),
        ({"mask_ratio": 0.99}, "train_mae.mask_ratio: Value error, of 16 patches it leaves 0.16 to be seen"),
        ({"published": "vit_base_patch16_224"}, "train_mae.published: String should match pattern"),
    ],
)
@pytest.mark.usefixtures("project")
def test_sizes_that_do_not_fit_are_refused(values, message):
    set_params(**values)
    with pytest.raises(InputError, match=message):
        Params.load("train_mae", "shapes")
