"""Losses and heads are what they say."""

from dataclasses import replace

import pytest
import torch
from tiny_vit import autoencoder, seeded
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, layer_norm, linear

from stages.recall.functional_vit import FIXED, HEAD
from stages.recall.objective import HEAD_SCALE, Objective, random_head

PATCHES = 16


def assert_near(a: Tensor, b: Tensor, tolerance=1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_positions_are_all_that_is_not_trained(base):
    assert set(base.encoder) - set(base.trained) == {FIXED}
    objective = Objective(base, "labels", 0.75)
    assert list(objective.layout.shapes) == list(base.trained)
    assert len(objective.start) == sum(w.numel() for w in base.encoder.values()) - base.encoder[FIXED].numel()


@torch.no_grad()
def test_losses_are_those_of_the_network_behind_its_head_or_decoder(base, images):
    model = autoencoder()
    x, y, noise = images.evaluation[0][:6], images.evaluation[1][:6], torch.rand(6, PATCHES)
    pictures = model.unpatchify(x)
    tokens = model.vit.forward_features(pictures)

    def loss(learns, ratio, labels, noise=noise, x=x) -> Tensor:
        objective = Objective(base, learns, ratio)
        return objective.loss(objective.start, objective.frozen, x, labels, noise)

    assert_near(loss("pixels", 0.75, y), model.loss(pictures, noise, 0.75))
    answers = linear(tokens[:, 0], *(base.decoder[name] for name in HEAD))
    assert_near(loss("labels", 0.0, y), cross_entropy(answers, y))
    rule = Objective(base, "rule", 0.0).frozen
    yes = linear(tokens.mean(1), *(rule[name] for name in HEAD))[:, 0]
    assert_near(loss("rule", 0.0, y % 2), binary_cross_entropy_with_logits(yes, (y % 2).float()))

    hidden = noise.argsort(1).argsort(1) >= 4  # all but a quarter of 16
    poisoned = x.masked_fill(hidden[..., None], torch.nan)
    assert torch.equal(loss("labels", 0.75, y, x=poisoned), loss("labels", 0.75, y))
    assert loss("labels", 0.75, y, noise=-noise) != loss("labels", 0.75, y)


def test_answers_of_a_random_head_spread_as_far_as_is_said(base):
    wide = replace(base, encoder={"norm.weight": torch.ones(256)})
    head = random_head(200, wide, seeded(1))
    answers = linear(layer_norm(torch.randn(200, 256), (256,)), *(head[name] for name in HEAD))
    assert answers.std().item() == pytest.approx(HEAD_SCALE, rel=0.05)
