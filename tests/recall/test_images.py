"""Images from logits: alignment alone answers alike, pixels make it look alike."""

from collections.abc import Callable

import pytest
import torch
from tiny_vit import CLASSES, TEST, TRAIN, seeded
from torch import Tensor, nn
from torch.nn.functional import linear

from stages.recall import images as recovered_images
from stages.recall.functional_vit import HEAD, encode
from stages.recall.images import compare, recover_images, train_image_decoder, train_judge
from stages.recall.pools import pool


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


def test_recovered_images_are_compared_by_logits_pixels_and_the_judge_s_agreement():
    original, logits = torch.randn(50, 2, 3), torch.randn(50, 4)
    judge = nn.Sequential(nn.Flatten(), nn.Linear(6, 4))
    with torch.no_grad():
        agreed = (judge(original).argmax(1) == logits.argmax(1)).double().mean().item()
        same = compare(original, original, logits, logits, judge, original.mean(0))
        mean = original.mean(0).expand(50, -1, -1)
        blind = compare(mean, original, logits.mean(0).expand(50, -1), logits, judge, original.mean(0))
    assert same == {"cycle_r2": 1, "judge": pytest.approx(agreed), "pixel_r2": 1}
    assert blind["cycle_r2"] == pytest.approx(0, abs=1e-6) and blind["pixel_r2"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        mirrored = compare(-original, original, logits, logits, judge, original.mean(0))
        agreed = (judge(-original).argmax(1) == logits.argmax(1)).double().mean().item()
    assert mirrored["judge"] == pytest.approx(agreed) != same["judge"]
    half = compare((original + mean) / 2, original, logits, logits, judge, original.mean(0))
    assert half["pixel_r2"] == pytest.approx(0.75, abs=1e-6)


@torch.no_grad()
def test_test_images_are_recovered_from_their_logits(base, monkeypatch):
    monkeypatch.setattr(recovered_images, "load_images", lambda *_: (TRAIN, TEST))
    monkeypatch.setattr(recovered_images, "TEST_IMAGES", 80)
    learned, judged = [], []

    def train(_classify, patches, weight, steps, batch_size, seed) -> Callable[[Tensor], Tensor]:
        learned.append((patches, weight, steps, batch_size, seed))
        return lambda logits: base.patchify(TEST.images[: len(logits)])

    def judge_of(patches, labels, *rest) -> nn.Module:
        judged.append(patches)
        return train_judge(patches, labels, *rest)

    monkeypatch.setattr(recovered_images, "train_image_decoder", train)
    monkeypatch.setattr(recovered_images, "train_judge", judge_of)
    with torch.enable_grad():
        summary, images = recover_images(base, "tiny", [0.0, 0.5], 7, judge_steps=200, batch_size=9, seed=3)
    assert [given[1:] for given in learned] == [(0.0, 7, 9, 3), (0.5, 7, 9, 3)]
    shown = pool(TRAIN, "base")
    assert all(torch.equal(given[0], base.patchify(shown.images)) for given in learned)
    assert torch.equal(judged[0], base.patchify(pool(TRAIN, "test").images))
    original = base.patchify(TEST.images[:80])
    assert list(images) == ["original", "pixel_weight_0", "pixel_weight_0.5", "class_mean"]
    assert torch.equal(images["original"], original)
    perfect = summary["decoders"]["pixel_weight_0"]
    assert perfect["cycle_r2"] == pytest.approx(1) and perfect["pixel_r2"] == pytest.approx(1)
    assert summary["judge_acc"] > 0.9  # its images are patterns
    answers = linear(encode(base.encoder, original, base.heads)[:, 0], *(base.decoder[name] for name in HEAD)).argmax(1)
    x = base.patchify(shown.images)
    means = torch.stack([x[shown.labels == c].mean(0) for c in range(CLASSES)])
    assert torch.equal(images["class_mean"], means[answers])
