"""Images recovered from a classifier's logits: a decoder that goes the way back, and a judge of what it draws.

Axes: n images, p patches, q pixels of a patch, c classes.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from stages.common.files import Summary
from stages.common.images import load_images
from stages.common.randomness import generator, seeded_init
from stages.common.runtime import parallel_map
from stages.recall.decoders import r_squared
from stages.recall.functional_vit import Base
from stages.recall.objective import Objective
from stages.recall.pools import pool

LEARNING_RATE = 2e-3  # of Adam, of judge and decoders: both are perceptrons of two to three layers
HIDDEN = 128  # of the judge and, twice as many behind, of the decoders
JUDGE_BATCH = 128  # images
AT_ONCE = 500  # images, where nothing is trained
TEST_IMAGES = 2000  # to recover at most: R² and agreement to 1 %


def train_judge(
    patches: Float[Tensor, "n p q"], labels: Int[Tensor, " n"], classes: int, steps: int, seed: int
) -> nn.Module:
    """Return a classifier that shares nothing with the networks it judges: another architecture, other images."""
    with seeded_init(seed):
        hidden, last = nn.Linear(patches[0].numel(), HIDDEN), nn.Linear(HIDDEN, classes)
        judge = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), last)
    judge = judge.to(patches.device)
    optimizer = torch.optim.Adam(judge.parameters(), LEARNING_RATE, fused=True)
    random = generator(seed, "judge")
    for _ in range(steps):
        rows = torch.randint(len(labels), (JUDGE_BATCH,), generator=random).to(labels.device)
        loss = cross_entropy(judge(patches[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


def train_image_decoder(
    classify: Callable[[Float[Tensor, "n p q"]], Float[Tensor, "n c"]],
    patches: Float[Tensor, "n p q"],
    pixel_weight: float,
    steps: int,
    batch_size: int,
    seed: int,
) -> nn.Module:
    """Return a decoder from a classifier's logits to images that have the same logits, and that are like the originals.

    Its loss is |f(g(c)) - c|² + pixel_weight |g(c) - x|², of logits c = f(x): alignment, and pixels.
    """
    with torch.no_grad():
        logits = torch.cat([classify(batch) for batch in patches.split(AT_ONCE)])
    with seeded_init(seed):
        sizes = [logits.shape[1], HIDDEN, 2 * HIDDEN, patches[0].numel()]
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.GELU())][:-1]
        decoder = nn.Sequential(*layers, nn.Unflatten(1, patches.shape[1:])).to(patches.device)
    optimizer = torch.optim.Adam(decoder.parameters(), LEARNING_RATE, fused=True)
    random = generator(seed, "image decoder")
    for _ in range(steps):
        rows = torch.randint(len(patches), (batch_size,), generator=random).to(patches.device)
        images = decoder(logits[rows])
        loss = mse_loss(classify(images), logits[rows]) + pixel_weight * mse_loss(images, patches[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return decoder.eval()


def recover_images(
    base: Base, dataset: str, pixel_weights: list[float], steps: int, judge_steps: int, batch_size: int, seed: int
) -> tuple[Summary, dict[str, Float[Tensor, "n p q"]]]:
    """Return how well images are recovered from logits, by alignment alone and with pixels; and the images.

    Decoders learn from the images that the base learned from, the judge from others; test images are recovered.
    """
    train, test = load_images(dataset, base.encoder["cls_token"].device)
    decoded, judged = pool(train, "base"), pool(train, "test")
    x, y = base.patchify(decoded.images), decoded.labels
    original, labels = base.patchify(test.images[:TEST_IMAGES]), test.labels[:TEST_IMAGES]
    objective = Objective(base, "labels", 0.0)
    weights = {**base.encoder, **objective.frozen}

    def classify(patches: Float[Tensor, "n p q"]) -> Float[Tensor, "n c"]:
        return objective.read_out(weights, patches)[0]

    def learn(pixel_weight: float) -> nn.Module:
        return train_image_decoder(classify, x, pixel_weight, steps, batch_size, seed)

    judge = train_judge(base.patchify(judged.images), judged.labels, len(train.classes), judge_steps, seed)
    decoders = parallel_map(learn, pixel_weights, x.device)
    with torch.no_grad():
        logits = classify(original)
        means = torch.stack([x[y == c].mean(0) for c in range(len(train.classes))])
        recovered = {f"pixel_weight_{w:g}": g(logits) for w, g in zip(pixel_weights, decoders, strict=True)}
        recovered["class_mean"] = means[logits.argmax(1)]
        measures = {
            name: compare(images, original, classify(images), logits, judge, x.mean(0))
            for name, images in recovered.items()
        }
        judge_acc = (judge(original).argmax(1) == labels).double().mean().item()
    return {"decoders": measures, "judge_acc": judge_acc}, {"original": original, **recovered}


def compare(
    images: Float[Tensor, "n p q"],
    original: Float[Tensor, "n p q"],
    logits: Float[Tensor, "n c"],
    original_logits: Float[Tensor, "n c"],
    judge: nn.Module,
    mean_image: Float[Tensor, "p q"],
) -> dict[str, float]:
    """Return R² of the logits of recovered images, the judge's agreement with the classifier's answers, and R² of pixels."""

    def r2(predicted: Tensor, true: Tensor, mean: Tensor) -> float:
        return r_squared(*(part.cpu().numpy() for part in (predicted, true, mean)))

    of_pixels = images.double().flatten(1), original.double().flatten(1), mean_image.flatten()
    return {
        "cycle_r2": r2(logits.double(), original_logits.double(), original_logits.mean(0).double()),
        "judge": (judge(images).argmax(1) == original_logits.argmax(1)).double().mean().item(),
        "pixel_r2": r2(*of_pixels),
    }
