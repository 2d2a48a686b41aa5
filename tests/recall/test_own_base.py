"""A base of one's own is what timm or transformers compute, and from a fleet of it an auditor in one file is made."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from reproduction import ROOT
from safetensors.torch import load_file, save_file
from tiny_vit import SIDE, save_inputs, seeded

from stages.common.images import load_images
from stages.common.stage import InputError, Loader
from stages.common.vectors import Layout
from stages.recall import adapt_backbone, audit, audit_backbone
from stages.recall.adapter_files import load_adapter, save_adapter
from stages.recall.adapters import canonical, dense
from stages.recall.auditor import Auditor
from stages.recall.functional_vit import FIXED, Base, encode
from stages.recall.own_base import read_own_base
from stages.recall.sketch import Sketch

MODEL, PIXELS = "test_vit", 32  # of timm: six blocks of 64 dimensions, patches of 16 pixels
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 4}


def timm_file(folder: Path, model: str = MODEL, **options: object) -> Path:
    """Random weights of a network of timm, as its own resolution has them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vit = timm.create_model(model, num_classes=0, **options)
    path = folder / "vit.safetensors"
    save_file({name: weight.contiguous() for name, weight in vit.state_dict().items()}, path)
    return path


def transformers_folder(folder: Path, kind: str = "ViT") -> tuple[Path, torch.nn.Module]:
    """A tiny network of transformers with random weights, as save_pretrained writes it."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES, intermediate_size=32, mlp_ratio=2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        model = getattr(transformers, f"{kind}Model")(config).eval()
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder / kind)
    return folder / kind, model


def patches_of(pixels: torch.Tensor, size: int) -> torch.Tensor:
    return pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def test_a_network_of_timm_is_computed_at_another_resolution_as_timm_computes_it(tmp_path):
    base = read_own_base(MODEL, str(timm_file(tmp_path)), PIXELS)
    vit = timm.create_model(MODEL, num_classes=0, img_size=PIXELS).eval()
    vit.load_state_dict(
        timm.models.vision_transformer.checkpoint_filter_fn(load_file(tmp_path / "vit.safetensors"), vit)
    )
    pixels = torch.randn(2, 3, PIXELS, PIXELS, generator=seeded())
    with torch.no_grad():
        assert torch.allclose(
            encode(base.encoder, patches_of(pixels, 16), base.heads), vit.forward_features(pixels), atol=1e-4
        )
    assert base.encoder[FIXED].shape[1] == 5 and FIXED not in base.trained


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_a_folder_of_transformers_is_computed_as_transformers_computes_it(tmp_path, kind):
    folder, model = transformers_folder(tmp_path, kind)
    base = read_own_base(None, str(folder), SIDE)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=seeded())
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        assert torch.allclose(encode(base.encoder, patches_of(pixels, 4), base.heads), expected, atol=1e-4)


def test_what_is_no_such_network_is_refused_in_words(tmp_path):
    path = str(timm_file(tmp_path))
    for model, source, size, words in (
        ("no_vit", path, PIXELS, "timm has no model"),
        ("resnet18", path, PIXELS, "is no vision transformer with a class token"),
        (MODEL, path, 40, "multiple of the patches' 16 pixels"),
        ("deit_tiny_patch16_224", path, PIXELS, "tensors are missing"),
        (None, path, PIXELS, "give a folder of save_pretrained"),
    ):
        with pytest.raises(InputError, match=words):
            read_own_base(model, source, size)
    folder, _ = transformers_folder(tmp_path)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "swin"}))
    with pytest.raises(InputError, match="got swin"):
        read_own_base(None, str(folder), SIDE)


def test_a_network_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    path, create = str(timm_file(tmp_path)), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **o: create(*a, act_layer="relu", **o))
    with pytest.raises(InputError, match="computes what is not known here"):
        read_own_base(MODEL, path, PIXELS)


def test_adapters_of_queries_and_values_lie_in_their_thirds_of_one_matrix(tmp_path):
    folder, _ = transformers_folder(tmp_path)
    base, random = read_own_base(None, str(folder), SIDE), np.random.default_rng(0)
    layout, factors, expected = Layout.of(base.trained), {}, np.zeros((48, 16))
    for part, name in ((0, "query"), (2, "value")):
        a, b = random.normal(size=(2, 16)), random.normal(size=(16, 2))
        expected[16 * part : 16 * (part + 1)] = 3 * b @ a
        key = f"base_model.model.vit.encoder.layer.1.attention.attention.{name}"
        factors |= {f"{key}.lora_A.weight": torch.from_numpy(a), f"{key}.lora_B.weight": torch.from_numpy(b)}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    adapters, _ = load_adapter(tmp_path, layout)
    change = dense(adapters, layout)[layout.slices["blocks.1.attn.qkv.weight"]].reshape(48, 16)
    assert list(adapters) == ["blocks.1.attn.qkv.weight"] and np.allclose(change, expected, atol=1e-5)


def test_sketches_follow_sums_keep_inner_products_and_never_need_the_product():
    layout = Layout({"a.weight": (70, 50), "small.weight": (3, 4), "bias": (5,)})
    sketch, random = Sketch(layout, 32), seeded(4)
    x, y = torch.randn(2, 400, layout.size, generator=random)
    small, other = (sketch.of(layout.unflatten(z)) for z in (x, y))
    assert small.shape[1] == 32 * 32 + 12 + 5
    assert torch.allclose(sketch.of(layout.unflatten(x - y)), small - other, atol=1e-4)
    exact, kept = x.square().sum(1), small.square().sum(1)
    assert (kept / exact).mean() == pytest.approx(1, abs=0.02)
    b, a = torch.randn(2, 70, 3, generator=random), torch.randn(2, 3, 50, generator=random)
    product = {name: torch.zeros(2, *shape) for name, shape in layout.shapes.items()} | {"a.weight": b @ a}
    assert torch.allclose(sketch.of_factors({"a.weight": (b, a)}), sketch.of(product), atol=1e-4)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with an auditor of a tiny network, of adapters and whole."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        load_images.cache_clear()
        save_inputs()
        base, _ = transformers_folder(folder)
        params = yaml.load((ROOT / "params.yaml").read_text(), Loader)
        own = params["adapt_backbone"]
        own |= {"dataset": "tiny", "stack": 2, "references": 16, "head_images": 100, "directions": 8}
        for recipe in own["recipes"].values():
            recipe |= {"steps": [2, 6], "learning_rate": [3e-3, 1e-2], "n_images": [8, 32]}
        fleets = {"train": {"adapter": 12, "whole": 12}, "test": {"adapter": 4, "whole": 4}}
        own["variants"] = {"tiny": {"model": None, "weights": str(base), "image_size": SIDE} | fleets}
        params["audit_backbone"]["resamples"] = 50
        Path("params.yaml").write_text(yaml.dump(params))
        for stage, argument in ((adapt_backbone, "variant"), (audit_backbone, "backbone")):
            patch.setattr("sys.argv", ["stage", f"--{argument}", "tiny"])
            stage.main()
        yield folder
        load_images.cache_clear()


AUDITOR = Path("models/audit_backbone/tiny/auditor.safetensors")


def parts_of(auditor: Path) -> tuple[Auditor, Base]:
    known = Auditor.load(auditor)
    return known, audit.read_backbone(Path(known.card["backbone"]["weights"]), known)


def test_an_adapter_of_ones_own_base_is_audited_from_one_file(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    auditor, base = parts_of(AUDITOR)
    layout, random = Layout.of(base.trained), np.random.default_rng(0)
    names = [name for name in layout.shapes if name.endswith("qkv.weight")]
    drawn = {n: canonical(random.normal(size=(48, 2)), random.normal(size=(2, 16)), 1e-3) for n in names}
    save_adapter(tmp_path / "adapter", drawn)
    change = audit.read_adapter(tmp_path / "adapter", base)
    sketch = auditor.condense(change, layout)
    assert np.allclose(sketch, Sketch(layout, 8).of(layout.unflatten(torch.from_numpy(change)))[None].numpy())
    monkeypatch.setattr(audit, "check", lambda *_: 1.0)  # what is drawn at random no training makes
    answer = audit.answer_for(None, None, tmp_path / "adapter", AUDITOR)
    assert answer["kind"] == "adapter" and len(answer["present"]["found"]) == 8
    assert answer["present"] == audit.answer_for(None, None, tmp_path / "adapter", AUDITOR.parent)["present"]


def test_a_random_adapter_another_base_and_the_base_itself_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    auditor, base = parts_of(AUDITOR)
    weights = Path(auditor.card["backbone"]["weights"])
    with pytest.raises(InputError, match="is the base itself"):
        audit.answer_for(None, weights, None, AUDITOR)
    with pytest.raises(InputError, match="is missing: give them by --base"):
        audit.answer_for(tmp_path / "gone", weights, None, AUDITOR)
    other, model = transformers_folder(tmp_path)
    with torch.no_grad():
        model.layernorm.weight += 0.1
    model.save_pretrained(other)
    with pytest.raises(InputError, match="is not the base that the auditor"):
        audit.answer_for(other, weights, None, AUDITOR)
    names = [name for name in base.trained if name.endswith("qkv.weight")]
    random = np.random.default_rng(0)
    save_adapter(
        tmp_path / "large", {n: canonical(random.normal(size=(48, 2)), random.normal(size=(2, 16))) for n in names}
    )
    with pytest.raises(InputError, match="its change"):
        audit.answer_for(None, None, tmp_path / "large", AUDITOR)


def test_a_fleet_does_not_depend_on_what_trains_beside(made, monkeypatch):
    """A fine-tune of a stack of its own is what it is in company."""
    monkeypatch.chdir(made)
    params = adapt_backbone.Params.load("adapt_backbone", variant="tiny")
    train, test = load_images("tiny", torch.device("cpu"))
    _, base = parts_of(AUDITOR)
    images = adapt_backbone.patchify_pools(base, train, test, 16, 20)
    for kind, ranks in (("adapter", 8), ("whole", 0)):
        fine_tunes = adapt_backbone.draw(kind, params.recipes[kind], (3, 0), params.seed, train)
        tuning = adapt_backbone.Tuning(base, ranks, 8)
        heads = {f.name: place == 1 for place, f in enumerate(fine_tunes)}
        tuning = pickle.loads(pickle.dumps(tuning))  # as it travels to a cluster
        together = adapt_backbone.finish(fine_tunes, tuning, images, heads)
        alone = adapt_backbone.finish(fine_tunes[1:2], tuning, images, heads)
        assert np.abs(together["change"]).max() > 1e-3
        for key in ("change", "responses", "negated.responses"):
            assert np.allclose(alone[key][0], together[key][1], atol=2e-3, rtol=1e-2), (kind, key)
        assert np.allclose(alone["average_of_two.change"], alone["change"], atol=1e-5)
