"""Classifiers of masked images see what is visible, and the one that is kept is the one that is reported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from running import start
from tiny_vit import CLASSES, CONFIG, TEST, autoencoder, base_of, seeded
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import linear

from stages.common.backbone import build_vit
from stages.common.mae import MaskedAutoencoder
from stages.recall import classify_masked
from stages.recall.classify_masked import METHODS, Batches, accuracies, choose_and_test, train_method
from stages.recall.functional_vit import FIXED, HEAD, load_base
from stages.recall.objective import random_head

PATCHES = 16
CLASSIFY = classify_masked.Params(
    seeds=[0], mask_ratios=[0.0, 0.6, 0.75], validation_fraction=0.2, steps=6, batch_size=8, learning_rates=[1e-3, 1e-2],
    penalties=[0.1, 1.0], test_images=80,
)  # fmt: skip
BATCHES = Batches(steps=6, size=8, mask_ratios=[0.0, 0.6, 0.75])


def test_what_is_hidden_is_the_same_for_all_networks_and_as_much_as_is_said(base, images, monkeypatch):
    data, ratios = images.evaluation, [0.0, 0.3, 0.6, 0.75, 0.9]
    networks = [{**base.encoder, **random_head(CLASSES, base, seeded(i))} for i in range(2)]
    asked: list[list[Tensor]] = []
    classify = classify_masked.classify

    def spy(w, patches, heads, visible):
        asked[-1].append(visible)
        hidden = torch.ones(patches.shape[:2], dtype=torch.bool).scatter(1, visible, False)
        blind = patches.masked_fill(hidden[..., None], torch.nan)
        answers = classify(w, blind, heads, visible)
        assert torch.equal(answers, classify(w, patches, heads, visible))
        return answers

    monkeypatch.setattr(classify_masked, "classify", spy)
    monkeypatch.setattr(classify_masked, "AT_ONCE", 20)  # several parts
    for order, network in ((ratios, networks[0]), (ratios[::-1], networks[1])):
        asked.append([])
        assert list(accuracies(network, base, data, order)) == [str(ratio) for ratio in order]
    first, second = ([torch.cat(seen[i : i + 3]) for i in range(0, len(seen), 3)] for seen in asked)
    for ratio, a, b in zip(ratios, first, second[::-1], strict=True):
        assert torch.equal(a, b)
        assert a.shape == (48, round(PATCHES * (1 - ratio)))
        assert all(len(set(row)) == len(row) for row in a.tolist())
    assert len({tuple(row) for row in first[3].tolist()}) > 40  # each image's own


def test_accuracy_is_the_share_answered_right_and_of_an_untrained_head_near_chance(base, images):
    x, y = images.pools["base"]
    heads = [random_head(CLASSES, base, seeded(i)) for i in range(30)]
    untrained = [accuracies({**base.encoder, **head}, base, (x, y), [0.0, 0.75]) for head in heads]
    for ratio in ("0.0", "0.75"):
        assert np.mean([found[ratio] for found in untrained]) == pytest.approx(1 / CLASSES, abs=0.04)
    network = {**base.encoder, **heads[0]}
    model = MaskedAutoencoder(build_vit(CONFIG))
    with torch.no_grad():
        tokens = functional_call(model.vit, dict(base.encoder), model.unpatchify(x))
    right = linear(tokens, *(network[name] for name in HEAD)).argmax(1) == y
    assert accuracies(network, base, (x, y), [0.0])["0.0"] == pytest.approx(right.double().mean().item(), abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_knows_what_it_says(base, images, method):
    pretrained, tuned = METHODS[method].pretrained, METHODS[method].tuned
    data, other = images.pools["base"], base_of(autoencoder(0.2))
    other = replace(other, encoder=other.encoder | {FIXED: base.encoder[FIXED]})

    def train(base, strengths, seed=0):
        return train_method(base, METHODS[method], strengths, seed, data, BATCHES)

    strengths = [1e-3, 1e-2] if tuned else [0.1, 1.0]
    networks, elsewhere, first = train(base, strengths), train(other, strengths), train(base, [1e-12])[0]
    assert len(networks) == 2
    for a, b in zip(networks, elsewhere, strict=True):
        assert a.keys() == {*base.encoder, *HEAD}
        assert torch.equal(a[FIXED], base.encoder[FIXED])
        assert all(torch.equal(a[name], b[name]) for name in a) == (not pretrained)
        moved = {name for name in a if (a[name] - first[name]).abs().max() > 1e-6}
        assert moved == ({*base.trained, *HEAD} if tuned else set(HEAD))
        if pretrained:
            assert all(torch.allclose(first[name], base.encoder[name], atol=1e-6) for name in base.trained)
    assert not torch.equal(networks[0]["head.weight"], networks[1]["head.weight"])
    again = train(base, strengths, seed=1)[0]
    assert not torch.equal(again["head.weight"], networks[0]["head.weight"])


@pytest.mark.usefixtures("inputs")
def test_the_network_that_is_kept_has_the_accuracy_that_is_reported(monkeypatch):
    monkeypatch.setattr(classify_masked.pictures, "draw_masked_accuracy", lambda *_: None)
    params = {"classify_masked": CLASSIFY.model_dump() | {"steps": 40, "overrides": {"tiny": {}}}}
    Path("params.yaml").write_text(yaml.dump(params))
    path = Path("models/train_mae/tiny/backbone.safetensors")
    given = load_base(path)
    start(monkeypatch, classify_masked, dataset="tiny")
    kept = load_base(Path("models/classify_masked/tiny/backbone.safetensors"))
    summary = json.loads(Path("reports/classify_masked/tiny/summary.json").read_text())
    assert summary["acc"].keys() == METHODS.keys()
    test = TEST.subset(torch.arange(80))
    data = kept.patchify(test.images), test.labels
    network = {**kept.encoder, **{name: kept.decoder[name] for name in HEAD}}
    found = accuracies(network, kept, data, CLASSIFY.mask_ratios)
    for ratio, accuracy in found.items():
        reported = summary["acc"]["fine_tuned"][ratio]["mean"]
        assert reported == pytest.approx(accuracy, abs=2.01 / 80)  # weights are kept in half precision
    assert found["0.0"] > 1 / CLASSES + 4 * (1 / CLASSES / 80) ** 0.5
    decoder = {name: tensor for name, tensor in kept.decoder.items() if name not in HEAD}
    assert decoder.keys() == given.decoder.keys() - set(HEAD)
    assert all(torch.equal(tensor, given.decoder[name]) for name, tensor in decoder.items())
    assert torch.equal(kept.encoder[FIXED], given.encoder[FIXED])


@pytest.mark.parametrize("method", ["fine_tuned", "random_encoder"])
def test_validation_images_choose_and_all_seeds_are_tested(base, monkeypatch, method):
    trained, measured = [], []

    def train(_base, _method, strengths, seed, data, batches) -> list[dict]:
        assert data == "fit" and batches == BATCHES
        trained.append((strengths, seed))
        return [{"network": (strength, seed)} for strength in strengths]

    def measure(network, _base, data, ratios) -> dict[str, float]:
        assert ratios == CLASSIFY.mask_ratios
        measured.append((network["network"], data))
        better = (network["network"][0] in (2.0, 3.0)) == (data == "validation")  # on test images the other one is
        return {str(ratio): 0.9 if better else 0.1 for ratio in ratios}

    monkeypatch.setattr(classify_masked, "train_method", train)
    monkeypatch.setattr(classify_masked, "accuracies", measure)
    best, strengths = (2.0, [1.0, 2.0]) if METHODS[method].tuned else (3.0, [3.0, 4.0])
    kept, tested = choose_and_test(base, METHODS[method], strengths, [0, 4, 5], BATCHES, "fit", "validation", "test")
    assert trained == [(strengths, 0), ([best], 4), ([best], 5)]
    assert kept == {"network": (best, 0)}
    assert [pair for pair in measured if pair[1] == "test"] == [((best, seed), "test") for seed in (0, 4, 5)]
    assert len(tested) == 3


def test_an_encoder_is_trained_at_all_mask_ratios_in_turn_and_probes_see_as_many_images_of_each(
    base, images, monkeypatch
):
    counts: list[int] = []
    encode = classify_masked.encode

    def spy(w, patches, heads, visible):
        counts.append(visible.shape[1])
        return encode(w, patches, heads, visible)

    monkeypatch.setattr(classify_masked, "encode", spy)
    x, y = images.pools["base"]
    train_method(base, METHODS["fine_tuned"], [1e-3], 0, (x, y), BATCHES)
    expected = [round(PATCHES * (1 - ratio)) for ratio in BATCHES.mask_ratios]
    assert counts == 2 * expected
    counts.clear()
    monkeypatch.setattr(classify_masked, "AT_ONCE", 1000)
    train_method(base, METHODS["frozen"], [1.0], 0, (x, y), BATCHES)
    assert counts == expected
