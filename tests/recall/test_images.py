"""Images from logits: alignment alone answers alike, pixels make it look alike."""

import pytest
import torch
from tiny_vit import seeded
from torch import Tensor

from stages.recall.images import train_image_decoder, train_judge


def test_alignment_alone_answers_alike_and_pixels_make_it_look_alike():
    patterns, mixing = torch.randn(3, 4, 6), torch.randn(24, 3) / 24**0.5
    labels = torch.randint(3, (300,), generator=seeded())
    patches = patterns[labels] + 0.3 * torch.randn(300, 4, 6)

    def classify(x: Tensor) -> Tensor:
        return x.flatten(1) @ mixing

    logits, errors = classify(patches), {}
    for weight in (0.0, 1.0):
        made = train_image_decoder(classify, patches, weight, 250, 32, 0)(logits)
        errors[weight] = {
            "answers": (classify(made) - logits).square().mean().item(),
            "pixels": (made - patches).square().mean().item(),
        }
    assert errors[0.0]["answers"] < errors[1.0]["answers"] < 0.1 * logits.var().item()
    assert errors[1.0]["pixels"] < 0.5 * errors[0.0]["pixels"]
    assert errors[1.0]["pixels"] < (patches - patches.mean(0)).square().mean().item()
    again = train_image_decoder(classify, patches, 1.0, 250, 32, 0)(logits)
    assert (again - patches).square().mean().item() == pytest.approx(errors[1.0]["pixels"], rel=1e-6)

    judge = train_judge(patches, labels, 3, 120, 0)
    held_out = patterns[labels] + 0.3 * torch.randn(300, 4, 6)
    assert (judge(held_out).argmax(1) == labels).double().mean() > 0.95
