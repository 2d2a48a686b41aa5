"""What is measured of a network: the properties that are to be predicted from its weights."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from stages.common.metrics import accuracy, calibration_error
from stages.weightnet.tracing.program import Program, Weights, run_stack

PROPERTIES = ("test_acc", "gap", "noise_acc", "fgsm_acc", "test_loss", "calibration_error")
REFERENCES = ("labelled_32", "labelled_128", "confidence_128")  # what a few images that it was not trained on tell
RANGES = {"gap": (-1.0, 1.0), "test_loss": (0.0, math.inf)}  # of properties; the others are shares
BLOCK = 256  # images at a time


def range_of(name: str) -> tuple[float, float]:
    """Return the least and the largest value that a property can have: shares, unless it is one of other names."""
    if name in PROPERTIES or name.endswith("_acc"):
        return RANGES.get(name, (0.0, 1.0))
    return -math.inf, math.inf


def run_blocks(
    program: Program, weights: Weights, images: Float[Tensor, "b c h w"], tanh: Bool[Tensor, " n"]
) -> Float[Tensor, "n b k"]:
    """Return the outputs of n networks on images, a block at a time."""
    return torch.cat([run_stack(program, weights, block, tanh) for block in images.split(BLOCK)], 1)


def fgsm(
    program: Program,
    weights: Weights,
    images: Float[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    tanh: Bool[Tensor, " n"],
    step: float,
) -> Float[Tensor, "n b c h w"]:
    """Return each network's own adversarial images: one step along the sign of the loss's gradient (Goodfellow et al. 2015)."""
    n = len(tanh)
    x = images.expand(n, *images.shape).clone().requires_grad_()
    with torch.enable_grad():
        logits = run_stack(program, weights, x, tanh)
        loss = cross_entropy(logits.flatten(0, 1), labels.repeat(n), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    return (x + step * gradient.sign()).detach()


@torch.no_grad()
def measure(
    program: Program,
    weights: Weights,
    tanh: Bool[Tensor, " n"],
    test: tuple[Float[Tensor, "b c h w"], Int[Tensor, " b"]],
    noisy: Float[Tensor, "b c h w"],
    attacked: int,
    fgsm_step: float,
) -> dict[str, Float[Tensor, " n"]]:
    """Return everything that is measured on test images: accuracy, loss, calibration, under noise, under FGSM.

    noisy: the test images with noise, the same for all networks. attacked: how many images FGSM is tried on.
    """
    images, labels = test
    logits = run_blocks(program, weights, images, tanh)
    loss = cross_entropy(logits.double().flatten(0, 1), labels.repeat(len(logits)), reduction="none")
    correct = []
    for x, y in zip(images[:attacked].split(BLOCK), labels[:attacked].split(BLOCK), strict=True):
        adversarial = fgsm(program, weights, x, y, tanh, fgsm_step)
        correct.append((run_stack(program, weights, adversarial, tanh).argmax(-1) == y).double())
    return {
        "test_acc": accuracy(logits, labels),
        "test_loss": loss.view(len(logits), -1).mean(1),
        "calibration_error": calibration_error(logits, labels),
        "noise_acc": accuracy(run_blocks(program, weights, noisy, tanh), labels),
        "fgsm_acc": torch.cat(correct, 1).mean(1),
    }


@torch.no_grad()
def measure_references(
    program: Program,
    weights: Weights,
    tanh: Bool[Tensor, " n"],
    images: Float[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
) -> dict[str, Float[Tensor, " n"]]:
    """Return accuracies on 32 and on 128 validation images, and the mean confidence on 128, for which no label is needed."""
    logits = run_blocks(program, weights, images[:128], tanh)
    confidence = logits.double().softmax(-1).amax(-1).mean(1)
    values = (accuracy(logits[:, :32], labels[:32]), accuracy(logits, labels[:128]), confidence)
    return dict(zip(REFERENCES, values, strict=True))


@torch.no_grad()
def train_accuracy(
    program: Program,
    weights: Weights,
    tanh: Bool[Tensor, " n"],
    images: list[Float[Tensor, "m c h w"]],
    labels: list[Int[Tensor, " m"]],
) -> Float[Tensor, " n"]:
    """Return each network's accuracy on images of its own, with the labels that it was trained on."""
    shares = []
    for i, (x, y) in enumerate(zip(images, labels, strict=True)):
        alone = {name: tensor[i : i + 1] for name, tensor in weights.items()}
        shares.append(accuracy(run_blocks(program, alone, x, tanh[i : i + 1]), y)[0])
    return torch.stack(shares)
