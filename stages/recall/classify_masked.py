"""Classify images of which patches are hidden, from a masked autoencoder's class token, beside what knows less.

Reads   data/<dataset>.safetensors, models/train_mae/<dataset>/backbone.safetensors
Writes  models/classify_masked/<dataset>/backbone.safetensors   the fine-tuned encoder, its head and the autoencoder's decoder
        reports/classify_masked/<dataset>/summary.json          test accuracy of each method at each mask ratio, over seeds
        reports/classify_masked/<dataset>/accuracy.png
Methods: the encoder fine-tuned, or frozen behind a trained head; the same architecture from scratch, and its random encoder frozen.
All learn from the base's pool of images, at all mask ratios in turn; validation images choose each one's learning rate or penalty,
by the first seed.
"""

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
from stages.common.images import load_images, split_validation
from stages.common.metrics import majority_accuracy, over_seeds
from stages.common.optim import warmup_cosine
from stages.common.randomness import generator
from stages.common.runtime import parallel_map, pick_device, pin_threads
from stages.common.stage import StageParams, parse_arguments, run
from stages.common.vectors import Layout
from stages.recall import pictures
from stages.recall.fleet import train_stack
from stages.recall.objective import random_head, random_start
from stages.recall.pools import pool
from stages.recall.vit import FIXED, HEAD, Base, Weights, encode, load_base, see

BASES = Path("models/train_mae")
MODELS = Path("models/classify_masked")
REPORTS = Path("reports/classify_masked")

METHODS = {  # starts from the autoencoder, trains the encoder
    "fine-tuned": (True, True),
    "frozen": (True, False),
    "from scratch": (False, True),
    "random encoder": (False, False),
}
STORED = "fine-tuned"
EVALUATED = 500  # images at a time


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


def classify(w: Weights, patches: Float[Tensor, "b p q"], heads: int, seen: Int[Tensor, "b k"]) -> Float[Tensor, "b c"]:
    """Return the head's answers to the class token."""
    return linear(encode(w, patches, heads, seen)[:, 0], *(w[name] for name in HEAD))


def train_method(
    base: Base, method: str, seed: int, data: tuple[Float[Tensor, "n p q"], Int[Tensor, " n"]], params: Params
) -> list[Weights]:
    """Return the networks of a method, of which validation images choose: one for each learning rate or penalty."""
    pretrained, tunes = METHODS[method]
    first, layout = base.trained, Layout.of(base.trained)
    if not pretrained:
        first = layout.unflatten(random_start(layout, generator(seed, "first weights")).to(base.encoder[FIXED]))
    return (fine_tune if tunes else probe)(base, first, seed, data, params)


def fine_tune(
    base: Base, first: Weights, seed: int, data: tuple[Float[Tensor, "n p q"], Int[Tensor, " n"]], params: Params
) -> list[Weights]:
    """Return the encoder `first`, trained behind a new head: one network for each learning rate."""
    (x, y), random = data, generator(seed, "classification")
    trained = {**first, **random_head(int(y.max()) + 1, base, random)}
    layout, m, fixed = Layout.of(trained), len(params.learning_rates), {FIXED: base.encoder[FIXED]}
    shape = params.steps, params.batch_size
    drawn = torch.randint(len(y), shape, generator=random).to(y)
    noise = torch.rand(*shape, base.patches, generator=random).to(x)

    def loss(vector: Tensor, frozen: Weights, patches: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
        return cross_entropy(classify({**layout.unflatten(vector), **frozen}, patches, base.heads, seen), labels)

    def batch(step: int) -> tuple[Tensor, ...]:
        seen = see(noise[step], params.mask_ratios[step % len(params.mask_ratios)])
        return tuple(part.expand(m, *part.shape) for part in (x[drawn[step]], y[drawn[step]], seen))

    rates, steps = torch.tensor(params.learning_rates).to(x), torch.full((m,), params.steps).to(y)
    stacked = {name: weight.expand(m, *weight.shape) for name, weight in fixed.items()}
    start = layout.flatten(trained).expand(m, -1)
    last = train_stack(loss, start, stacked, batch, rates, steps, warmup_cosine(params.steps, 0.05))
    return [{**layout.unflatten(vector), **fixed} for vector in last]


@torch.no_grad()
def probe(
    base: Base, encoder: Weights, seed: int, data: tuple[Float[Tensor, "n p q"], Int[Tensor, " n"]], params: Params
) -> list[Weights]:
    """Return the encoder as it is behind a logistic regression on its class token: one network for each penalty."""
    (x, y), random, w = data, generator(seed, "masks of probes"), {**encoder, FIXED: base.encoder[FIXED]}
    noise, parts = (
        torch.rand(len(x), base.patches, generator=random).to(x),
        torch.arange(len(x)).chunk(len(params.mask_ratios)),
    )
    tokens = torch.cat(
        [
            encode(w, x[at], base.heads, see(noise[at], ratio))[:, 0]
            for part, ratio in zip(parts, params.mask_ratios, strict=True)
            for at in part.split(EVALUATED)
        ]
    )
    mean, std = tokens.mean(0), tokens.std(0) + 1e-6
    networks = []
    for c in params.penalties:
        model = LogisticRegression(C=c, max_iter=300).fit(((tokens - mean) / std).cpu().numpy(), y.cpu().numpy())
        weight = torch.from_numpy(model.coef_).to(x) / std
        networks.append(
            {**w, **dict(zip(HEAD, (weight, torch.from_numpy(model.intercept_).to(x) - weight @ mean), strict=True))}
        )
    return networks


def only(params: Params, method: str, place: int) -> Params:
    """Return the parameters with the one learning rate, or penalty, of a method that was chosen."""
    name = "learning_rates" if METHODS[method][1] else "penalties"
    return params.model_copy(update={name: [getattr(params, name)[place]]})


@torch.no_grad()
def accuracies(
    w: Weights, base: Base, data: tuple[Float[Tensor, "n p q"], Int[Tensor, " n"]], ratios: list[float]
) -> dict[str, float]:
    """Return the accuracy at each mask ratio; which patches are hidden is the same for every network."""
    x, y = data
    noise = torch.rand(len(x), base.patches, generator=generator(0, "masks of evaluation")).to(x)
    found = {}
    for ratio in ratios:
        parts = zip(*(part.split(EVALUATED) for part in (x, y, see(noise, ratio))), strict=True)
        right = [(classify(w, a, base.heads, seen).argmax(1) == b).double() for a, b, seen in parts]
        found[str(ratio)] = torch.cat(right).mean().item()
    return found


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of train_mae.datasets").dataset
    params = Params.load("classify_masked", dataset)
    pin_threads()
    threadpool_limits(1)  # NumPy's, too: they change sums
    device = pick_device()
    path = BASES / dataset / "backbone.safetensors"
    base, (train, test) = load_base(path, device), load_images(dataset, device)
    fit, validation = split_validation(pool(train, "base"), params.validation_fraction, 0)
    test = test.subset(torch.arange(min(params.test_images, len(test)), device=device))
    data, chosen_on, tested_on = ((base.patchify(part.images), part.labels) for part in (fit, validation, test))

    def choose(method: str) -> tuple[Weights, list[dict[str, float]]]:
        first, *others = params.seeds
        networks = train_method(base, method, first, data, params)
        scores = [sum(accuracies(w, base, chosen_on, params.mask_ratios).values()) for w in networks]
        best = scores.index(max(scores))
        chosen = only(params, method, best)
        alike = [networks[best], *(train_method(base, method, seed, data, chosen)[0] for seed in others)]
        return alike[0], [accuracies(w, base, tested_on, params.mask_ratios) for w in alike]

    found = dict(zip(METHODS, parallel_map(choose, list(METHODS), device, f"classify {dataset}"), strict=True))

    stored, _ = found[STORED]
    decoder = base.decoder | {name: stored[name] for name in HEAD}
    tensors = {name: stored[name] for name in base.encoder} | {f"decoder.{k}": v for k, v in decoder.items()}
    arrays = {name: tensor.half().cpu().numpy() for name, tensor in tensors.items()}
    save_arrays(MODELS / dataset / "backbone.safetensors", arrays, {"config": load_metadata(path)["config"]})
    acc = {method: over_seeds(by_seed) for method, (_, by_seed) in found.items()}
    majority = majority_accuracy(fit.labels, test.labels)
    save_json(REPORTS / dataset / "summary.json", {"acc": acc, "majority": majority})
    pictures.draw_masked_accuracy(REPORTS / dataset / "accuracy.png", acc, majority)
    whole = str(min(params.mask_ratios))
    print(f"{dataset}: " + ", ".join(f"{method} {by[whole]['mean']:.1%}" for method, by in acc.items()))


if __name__ == "__main__":
    run(main)
