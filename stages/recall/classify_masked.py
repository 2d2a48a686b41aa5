"""Classify images of which patches are hidden, from a masked autoencoder's class token.

Methods: the encoder fine-tuned, or frozen behind a trained head; the same architecture from scratch, and its random encoder frozen.
All learn from the base's pool of images, at all mask ratios in turn; validation images choose each one's learning rate or penalty,
by the first seed.

Reads   data/<dataset>.safetensors, models/train_mae/<dataset>/backbone.safetensors
Writes  models/classify_masked/<dataset>/backbone.safetensors   the fine-tuned encoder, its head and the autoencoder's decoder
        reports/classify_masked/<dataset>/summary.json          test accuracy of each method at each mask ratio, over seeds
        reports/classify_masked/<dataset>/accuracy.png, vector/accuracy.svg

Axes: n images, b images of a batch, p patches, k of them visible, q pixels of a patch, c classes, m networks of a stack.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from stages.common.files import load_metadata, save_arrays, save_json
from stages.common.images import ImageSet, load_images, split_validation
from stages.common.metrics import majority_accuracy, over_seeds
from stages.common.optim import warmup_cosine
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import Layout
from stages.recall import pictures
from stages.recall.captions import caption
from stages.recall.fleet import train_stack
from stages.recall.functional_vit import FIXED, HEAD, Base, Weights, encode, load_base, visible_patches
from stages.recall.objective import random_head, random_start
from stages.recall.pools import pool

BASES = Path("models/train_mae")
MODELS = Path("models/classify_masked")
REPORTS = Path("reports/classify_masked")

WARMUP = 0.05  # of the steps, where the encoder is trained
PROBE_ITERATIONS = 300  # of a logistic regression, at most
AT_ONCE = 500  # images, where nothing is trained

Data = tuple[Float[Tensor, "n p q"], Int[Tensor, " n"]]  # patches and labels


@dataclass(frozen=True)
class Method:
    """How a classifier comes about."""

    pretrained: bool  # it starts from the autoencoder
    tuned: bool  # its encoder is trained


METHODS = {
    "fine_tuned": Method(pretrained=True, tuned=True),
    "frozen": Method(pretrained=True, tuned=False),
    "from_scratch": Method(pretrained=False, tuned=True),
    "random_encoder": Method(pretrained=False, tuned=False),
}
STORED = "fine_tuned"


class Params(StageParams):
    """Parameters of the classifiers of one data set."""

    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    mask_ratios: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1)]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]  # of Adam, where the encoder is trained
    # inverse, of logistic regressions on frozen encoders
    penalties: Annotated[list[PositiveFloat], Field(min_length=1)]
    test_images: PositiveInt


@dataclass(frozen=True)
class Batches:
    """What an encoder that is trained sees: in each step so many images, at the mask ratios in turn."""

    steps: int
    size: int
    mask_ratios: list[float]


def classify(
    w: Weights, patches: Float[Tensor, "b p q"], heads: int, visible: Int[Tensor, "b k"]
) -> Float[Tensor, "b c"]:
    """Return the head's logits of the class token."""
    return linear(encode(w, patches, heads, visible)[:, 0], *(w[name] for name in HEAD))


def train_method(
    base: Base, method: Method, strengths: list[float], seed: int, data: Data, batches: Batches
) -> list[Weights]:
    """Return the networks of a method, of which validation images choose: one for each learning rate or penalty."""
    encoder = base.trained
    if not method.pretrained:
        encoder = base.layout.unflatten(
            random_start(base.layout, generator(seed, "first weights")).to(base.encoder[FIXED])
        )
    if method.tuned:
        return fine_tune(base, encoder, strengths, seed, data, batches)
    return probe(base, encoder, strengths, seed, data, batches.mask_ratios)


def fine_tune(
    base: Base, encoder: Weights, learning_rates: list[float], seed: int, data: Data, batches: Batches
) -> list[Weights]:
    """Return the encoder, trained behind a new head: one network for each learning rate."""
    (x, y), random = data, generator(seed, "classification")
    trained = {**encoder, **random_head(int(y.max()) + 1, base, random)}
    layout, m, fixed = Layout.of(trained), len(learning_rates), {FIXED: base.encoder[FIXED]}
    shape, ratios = (batches.steps, batches.size), batches.mask_ratios
    drawn = torch.randint(len(y), shape, generator=random).to(y)
    noise = torch.rand(*shape, base.patches, generator=random).to(x)

    def loss(vector: Tensor, frozen: Weights, patches: Tensor, labels: Tensor, visible: Tensor) -> Tensor:
        return cross_entropy(classify({**layout.unflatten(vector), **frozen}, patches, base.heads, visible), labels)

    def batch(step: int) -> tuple[Tensor, ...]:
        visible = visible_patches(noise[step], ratios[step % len(ratios)])
        return tuple(values.expand(m, *values.shape) for values in (x[drawn[step]], y[drawn[step]], visible))

    rates, steps = torch.tensor(learning_rates).to(x), torch.full((m,), batches.steps).to(y)
    stacked = {name: weight.expand(m, *weight.shape) for name, weight in fixed.items()}
    start = layout.flatten(trained).expand(m, -1)
    last = train_stack(loss, start, stacked, batch, rates, steps, warmup_cosine(batches.steps, WARMUP))
    return [{**layout.unflatten(vector), **fixed} for vector in last]


@torch.no_grad()
def probe(
    base: Base, encoder: Weights, penalties: list[float], seed: int, data: Data, mask_ratios: list[float]
) -> list[Weights]:
    """Return the encoder as it is behind a logistic regression on its class token: one network for each penalty."""
    (x, y), random, w = data, generator(seed, "masks of probes"), {**encoder, FIXED: base.encoder[FIXED]}
    noise = torch.rand(len(x), base.patches, generator=random).to(x)
    tokens = torch.cat(
        [
            encode(w, x[rows], base.heads, visible_patches(noise[rows], ratio))[:, 0]
            for chunk, ratio in zip(torch.arange(len(x)).chunk(len(mask_ratios)), mask_ratios, strict=True)
            for rows in chunk.split(AT_ONCE)
        ]
    )
    mean, std = tokens.mean(0), tokens.std(0) + 1e-6
    networks = []
    for c in penalties:
        model = LogisticRegression(C=c, max_iter=PROBE_ITERATIONS)
        model.fit(((tokens - mean) / std).cpu().numpy(), y.cpu().numpy())
        weight = torch.from_numpy(model.coef_).to(x) / std
        bias = torch.from_numpy(model.intercept_).to(x) - weight @ mean
        networks.append({**w, **dict(zip(HEAD, (weight, bias), strict=True))})
    return networks


@torch.no_grad()
def accuracies(w: Weights, base: Base, data: Data, ratios: list[float]) -> dict[str, float]:
    """Return the accuracy at each mask ratio; which patches are hidden is the same for every network."""
    x, y = data
    noise = torch.rand(len(x), base.patches, generator=generator(0, "masks of evaluation")).to(x)
    by_ratio = {}
    for ratio in ratios:
        batches = zip(*(values.split(AT_ONCE) for values in (x, y, visible_patches(noise, ratio))), strict=True)
        right = [(classify(w, a, base.heads, visible).argmax(1) == b).double() for a, b, visible in batches]
        by_ratio[str(ratio)] = torch.cat(right).mean().item()
    return by_ratio


def choose_and_test(
    base: Base,
    method: Method,
    strengths: list[float],
    seeds: list[int],
    batches: Batches,
    fit: Data,
    validation: Data,
    test: Data,
) -> tuple[Weights, list[dict[str, float]]]:
    """Return a method's network of the first seed, of the strength that is best on validation images, and all seeds' test accuracies."""
    first, *others = seeds
    networks = train_method(base, method, strengths, first, fit, batches)
    scores = [sum(accuracies(w, base, validation, batches.mask_ratios).values()) for w in networks]
    best = scores.index(max(scores))
    chosen = [train_method(base, method, [strengths[best]], seed, fit, batches)[0] for seed in others]
    networks = [networks[best], *chosen]
    return networks[0], [accuracies(w, base, test, batches.mask_ratios) for w in networks]


def save_classifier(dataset: str, base: Base, network: Weights) -> None:
    """Write the fine-tuned encoder, its head and the autoencoder's decoder, in half precision."""
    decoder = base.decoder | {name: network[name] for name in HEAD}
    tensors = {name: network[name] for name in base.encoder} | {f"decoder.{k}": v for k, v in decoder.items()}
    arrays = {name: tensor.half().cpu().numpy() for name, tensor in tensors.items()}
    config = load_metadata(BASES / dataset / "backbone.safetensors")["config"]
    save_arrays(MODELS / dataset / "backbone.safetensors", arrays, {"config": config})


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_mae.datasets").dataset
    params = Params.load("classify_masked", dataset)
    pin_threads()
    threadpool_limits(1)  # NumPy's, too: they change sums
    device = pick_device()
    base = load_base(BASES / dataset / "backbone.safetensors", device)
    train, test = load_images(dataset, device)
    fit, validation = split_validation(pool(train, "base"), params.validation_fraction, 0)
    test = test.subset(torch.arange(min(params.test_images, len(test)), device=device))

    def data_of(images: ImageSet) -> Data:
        return base.patchify(images.images), images.labels

    data = data_of(fit), data_of(validation), data_of(test)
    batches = Batches(params.steps, params.batch_size, params.mask_ratios)

    def compute(method: Method) -> tuple[Weights, list[dict[str, float]]]:
        strengths = params.learning_rates if method.tuned else params.penalties
        return choose_and_test(base, method, strengths, params.seeds, batches, *data)

    results = parallel_map(compute, list(METHODS.values()), device, f"classify {dataset}")
    by_method = dict(zip(METHODS, results, strict=True))
    save_classifier(dataset, base, by_method[STORED][0])
    acc = {method: over_seeds(by_seed) for method, (_, by_seed) in by_method.items()}
    majority = majority_accuracy(fit.labels, test.labels)
    save_json(REPORTS / dataset / "summary.json", {"acc": acc, "majority": majority})
    pictures.draw_masked_accuracy(REPORTS / dataset / "accuracy.png", acc, majority)
    whole = str(min(params.mask_ratios))
    print(f"{dataset}: " + ", ".join(f"{caption(method)} {by[whole]['mean']:.1%}" for method, by in acc.items()))


if __name__ == "__main__":
    run(main)
