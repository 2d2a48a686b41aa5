"""How the pixels were scaled that a network learned from, by what the network shows of it.

Three things tell, the surest first:
batch norm     its running mean is what the data set's mean image gives there, if all that comes before it is linear
black pixels   gradient descent moves the weight of a pixel by the pixel's value times what it moves the bias: of a first linear layer,
               the weights of pixels that are black in all images have moved with the biases, or, where black is 0, not at all
answers        to the exam are better and less uncertain, as the network learned to see
What they leave open stays open: the answer is then the hull of the intervals for every scaling that is plausible.
"""

import math
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from stages.weightnet.predictors.examiner import Examiner
from stages.weightnet.tracing.program import Program, rescaled_input, run_steps
from stages.weightnet.zoo.networks import Networks

K = TypeVar("K")
Scaling = tuple[float, float]  # mean and deviation of the pixels, as the network sees them

UNSCALED = (0.0, 1.0)
# mean and deviation of the pixels of a zoo's images, where they go from 0 to 1
PIXELS = {"digits": (0.305, 0.376), "mnist": (0.1307, 0.3081), "fashion_mnist": (0.286, 0.353)}
LINEAR = ("input", "constant", "add", "conv", "linear", "flatten", "reshape", "expand", "interpolate")
TWICE, NEAR = 2.0, 0.02  # a batch norm's error may be so many times the least, and deviations more
FAR = 0.5  # deviations: a batch norm that no scaling comes nearer to tells nothing
BLACK = 1e-2  # deviations of pixels around the least of the mean image: black in all images
ERROR = 0.1  # of black's value: where it is known worse, it tells nothing
ZERO = 0.3  # black that is nearer to 0 is 0: others' is -0.42 and less
SKILL = 0.2  # of a predicted accuracy's logit, against the logarithm of how uncertain it is
MARGIN = 0.28  # the true scaling of 95 % of the zoos' networks was within it, their architectures left out


def usual_scalings(dataset: str) -> dict[str, Scaling]:
    """Return mean and deviation of a zoo's pixels as people scale them, by name; what they are in the zoo comes first."""
    if dataset not in PIXELS:
        return {"standardised": UNSCALED}
    mean, std = PIXELS[dataset]
    found = {
        "standardised": UNSCALED,
        "from 0 to 1": (mean, std),
        "from -1 to 1": (2 * mean - 1, 2 * std),
        "from 0 to 255": (255 * mean, 255 * std),
    }
    if dataset == "fashion_mnist":  # the numbers that most tutorials have
        m, s = PIXELS["mnist"]
        found["standardised as MNIST"] = ((mean - m) / s, std / s)
    return found


def black(dataset: str) -> float | None:
    """Return black in units of a zoo's images, if that is known."""
    mean, std = PIXELS.get(dataset, (math.nan, 1.0))
    return None if math.isnan(mean) else -mean / std


def norm_error(networks: Networks, mean_image: Float[Tensor, "c h w"]) -> float:
    """Return how far the running mean of one network's first batch norm is from what the mean image gives there.

    The root of the mean square over channels, in running deviations. A linear map's mean is the map of the mean; with the momentum
    of training, that of the last images. Infinite where there is no batch norm, or a step before it is not linear.
    """
    program, given = networks.program, []
    for step, result in zip(program.steps, run_steps(program, networks.weights, mean_image[None]), strict=True):
        if step.kind == "batch_norm" and "axis" not in step.options:
            mean, variance = (networks.weights[step.tensors[part]][0] for part in ("running_mean", "running_var"))
            channels = given[step.inputs[0]][0, 0].reshape(-1, len(mean)).mean(0)
            return ((channels - mean).square() / variance).mean().sqrt().item()
        scaled = step.kind == "mul" and any(program.steps[place].kind == "constant" for place in step.inputs)
        if not (scaled or step.kind in LINEAR):
            break
        given.append(result)
    return math.inf


def black_value(networks: Networks, mean_image: Float[Tensor, "c h w"]) -> float:
    """Return what black was, by the weights of one network's first layer, if that is linear; NaN if they do not tell.

    dL/dw = x dL/db for a pixel x: where it is always black, plain gradient descent moves the weight by black times what it moves the
    bias, and Adam, which only sees signs, by as much as the bias. What neurons' biases have moved is not known, but how much of
    their variance it is: the rest is that of torch's initialisation, uniform in ±1/sqrt(f) for f pixels.
    """
    layer = first_linear(networks.program)
    if layer is None:
        return math.nan
    weight, bias = (networks.weights[layer[part]][0].double() for part in ("weight", "bias"))
    black = weight[:, (mean_image < mean_image.min() + BLACK).flatten()].mean(1)
    spread = bias.var()
    moved = 1 - 1 / (3 * weight.shape[1] * spread)
    slope = ((black - black.mean()) * (bias - bias.mean())).sum() / (len(bias) - 1) / spread
    error = (black.var() / spread / len(bias)).sqrt()
    return (slope / moved).item() if 0 < error < ERROR * moved else math.nan


def first_linear(program: Program) -> dict[str, str] | None:
    """Return the names of the tensors of the linear layer that reads all pixels of an image, if the first layer is one, with a bias."""
    for step in program.steps[1:]:
        if step.kind == "linear" and "bias" in step.tensors and len(program.steps[step.inputs[0]].shape) == 1:
            return step.tensors
        if step.kind not in ("flatten", "reshape"):
            break
    return None


def told_by_weights(
    networks: Networks | None, scalings: dict[str, Scaling], mean_image: Float[Tensor, "c h w"] | None
) -> tuple[list[str], str]:
    """Return the scalings that one network's weights leave possible, and what of it tells; all of them, if they say nothing."""
    if networks is None or mean_image is None:
        return list(scalings), "answers"
    errors = {
        name: norm_error(replace(networks, program=rescaled_input(networks.program, *ends)), mean_image)
        for name, ends in scalings.items()
    }
    if (least := min(errors.values())) < FAR:
        return [name for name, error in errors.items() if error <= TWICE * least + NEAR], "batch norm"
    value, darkest = black_value(networks, mean_image), mean_image.min().item()
    if value < ZERO:  # not if NaN, or of another sign, which nobody's black has
        zero = [abs(mean + std * darkest) < ZERO * std for mean, std in scalings.values()]
        return [
            name for name, is_zero in zip(scalings, zero, strict=True) if is_zero == (value > -ZERO)
        ], "weights of black pixels"
    return list(scalings), "answers"


def plausible(examiner: Examiner, marks: dict[K, Float[Tensor, "1 r"]]) -> list[K]:
    """Return what a network may be given (scalings, say) with which its marks are about as little uncertain, and as good, as with the
    best, which is first.
    """
    k = examiner.skill
    mean, std = (examiner.scale[f"target_{part}"][k].item() for part in ("mean", "std"))
    scores = {
        name: examiner.ridge.deviation(own)[0, k].log().item()
        - SKILL * (mean + std * examiner.ridge.predict(own)[0, k].item())
        for name, own in marks.items()
    }
    ordered = sorted(scores, key=lambda name: scores[name])
    return [name for name in ordered if scores[name] < scores[ordered[0]] + MARGIN]


def hull(intervals: Float[Tensor, "3 p k"]) -> Float[Tensor, "3 k"]:
    """Return the prediction of the first of p scalings, between the lowest of the lower and the highest of the upper ends of all."""
    return torch.stack([intervals[0].amin(0), intervals[1, 0], intervals[2].amax(0)])


def what_is_said(names: list[str], scalings: dict[str, Scaling], told_by: str) -> str:
    """Return the line that a user reads of the scalings that are plausible."""
    if len(names) == 1:
        return f"pixels: taken to be {names[0]}, by its {told_by} (--pixels says otherwise)"
    ends = [" ".join(f"{number:.4g}" for number in scalings[name]) for name in names]
    either = "either of them" if len(names) == 2 else f"each of the {len(names)}"
    return (
        f"pixels: probably {', '.join(names[:-1])} or {names[-1]}, not told apart, and intervals hold for {either}; "
        f"say which by --pixels {', or '.join(ends)}"
    )


def what_is_said_of_borders(bordered: list[bool]) -> str:
    """Return the line that a user reads of how images were made as large as a network takes them."""
    either = ("resized", "given a black border")
    if len(set(bordered)) == 1:
        return f"larger images: taken to be {either[bordered[0]]}, by its answers"
    first = either[bordered[0]], either[not bordered[0]]
    return f"larger images: probably {' or '.join(first)}, not told apart, and intervals hold for either of them"
