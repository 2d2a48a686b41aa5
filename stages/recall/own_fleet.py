"""Fleets of a base of one's own, which may be large: adapters are trained as factors, and only sketches of changes are kept.

The base's weights are shared by all networks of a stack, so that their batches go through one product of matrices. Each fine-tune either
keeps the base's head, or trains a new one from zeros that is then thrown away, as people's heads are not the auditor's.

Axes: m networks of a stack, v trained numbers of a network, w weights, b images of a batch, n reference inputs, e images to evaluate on,
c classes, r responses, s numbers of a sketch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import cross_entropy, linear

from stages.common.vectors import Layout
from stages.recall.adapters import AdapterSpace
from stages.recall.fleet import PatchedImages, pool_of
from stages.recall.functional_vit import HEAD, Base, Weights, encode
from stages.recall.recipes import TARGETS, Rules, WideFineTune, shifted, train_by_rules, trained_weights
from stages.recall.sketch import Sketch

NEW_HEAD = "trained head"  # of a recipe's numbers
ALTERED = ("negated", "average_of_two")  # what is done to finished changes: linear, so that sketches follow


@dataclass(frozen=True)
class Tuning:
    """What of a base is trained: all its weights, or adapters of at most so many ranks; and a head."""

    base: Base  # behind a head
    ranks: int  # 0: the weights themselves
    directions: int  # of sketches

    @property
    def network(self) -> Layout:
        """How the base's weights are cut, in one vector."""
        return self.base.layout

    @cached_property
    def space(self) -> AdapterSpace:
        """The adapters."""
        return AdapterSpace(self.network, self.ranks)

    @cached_property
    def sketch(self) -> Sketch:
        """What is kept of changes."""
        return Sketch(self.network, self.directions)

    @cached_property
    def body(self) -> Layout:
        """How what is trained beside the head is cut."""
        return self.space.layout if self.ranks else self.network

    @cached_property
    def layout(self) -> Layout:
        """How all that is trained is cut."""
        return Layout(self.body.shapes | {name: tuple(self.base.decoder[name].shape) for name in HEAD})

    def first(self, fine_tune: WideFineTune, new_head: bool) -> Float[Tensor, " v"]:
        """Return what a fine-tune starts from."""
        training, start = fine_tune.training, self.base.trained
        if self.ranks:
            body = self.space.start(fine_tune.random("adapter"), training.rank, TARGETS[training.targets])
            start = self.body.unflatten(body)
        head = {name: self.base.decoder[name] * (not new_head) for name in HEAD}
        return self.layout.flatten({**start, **head})

    def trained(self, fine_tune: WideFineTune, new_head: bool) -> Bool[Tensor, " v"]:
        """Return which numbers a fine-tune trains."""
        layers = fine_tune.training.layers
        body = torch.ones(self.body.size, dtype=torch.bool) if self.ranks else trained_weights(self.network, layers)
        return torch.cat([body, torch.full((self.layout.size - self.body.size,), new_head)])

    def weights(self, vector: Float[Tensor, " v"], scale: Float[Tensor, ""]) -> dict[str, Tensor]:
        """Return all that a network computes with, its own head among them."""
        parts = self.layout.unflatten(vector)
        head = {name: parts[name] for name in HEAD}
        if not self.ranks:
            return {**self.base.encoder, **parts}
        return {**self.base.encoder, **factors(self.adapters(vector, scale)), **head}

    def adapters(self, vector: Float[Tensor, " v"], scale: Float[Tensor, ""]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return B and A of every matrix, the scale in B."""
        parts = self.layout.unflatten(vector)
        return {name: (scale * parts[f"B.{name}"], parts[f"A.{name}"]) for name in self.space.matrices}

    def loss(
        self, vector: Float[Tensor, " v"], frozen: Weights, patches: Float[Tensor, "b p q"], labels: Int[Tensor, " b"]
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch."""
        return cross_entropy(self.logits(self.weights(vector, frozen["scale"]), patches), labels)

    def logits(self, w: Weights, patches: Float[Tensor, "b p q"]) -> Float[Tensor, "b c"]:
        """Return the answers of a network's head to its class token."""
        return linear(encode(w, patches, self.base.heads)[:, 0], *(w[name] for name in HEAD))

    def respond(self, w: Weights, references: Float[Tensor, "n p q"]) -> Float[Tensor, " r"]:
        """Return logits, by the base's head, and mean tokens: what an Objective responds."""
        tokens = encode({**self.base.encoder, **w}, references, self.base.heads)
        logits = linear(tokens[:, 0], *(self.base.decoder[name] for name in HEAD))
        return torch.cat([logits.flatten(), tokens.mean(1).flatten()])


def factors(adapters: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return B and A of matrices under the names by which networks find them."""
    named = {}
    for name, (b, a) in adapters.items():
        module = name.removesuffix(".weight")
        named |= {f"{module}.B": b, f"{module}.A": a}
    return named


def train(
    fine_tunes: list[WideFineTune], tuning: Tuning, images: PatchedImages, new_heads: list[bool]
) -> Float[Tensor, "m v"]:
    """Train a stack of fine-tunes of one batch size; return what they trained."""
    trainings, device = [f.training for f in fine_tunes], next(iter(tuning.base.encoder.values())).device
    shape = max(f.steps for f in fine_tunes), trainings[0].batch_size
    batches, shifts = ([f.random(purpose) for f in fine_tunes] for purpose in ("batches", "shifts"))
    places = [torch.randint(len(f.images), shape, generator=r) for f, r in zip(fine_tunes, batches, strict=True)]
    pixels = [images.pools[pool_of(f.test)][0] for f in fine_tunes]

    def batch(step: int) -> tuple[Tensor, ...]:
        parts, labels = [], []
        for f, x, at, random in zip(fine_tunes, pixels, places, shifts, strict=True):
            part = x[f.images[at[step]].to(device)]
            parts.append(shifted(tuning.base, part, f.training.shift, random) if f.training.shift else part)
            labels.append(f.labels[at[step]].to(device))
        return torch.stack(parts), torch.stack(labels)

    first = torch.stack([tuning.first(f, new) for f, new in zip(fine_tunes, new_heads, strict=True)]).to(device)
    trained = torch.stack([tuning.trained(f, new) for f, new in zip(fine_tunes, new_heads, strict=True)]).to(device)
    frozen = {"scale": scales(fine_tunes).to(device)}
    return train_by_rules(tuning.loss, first, frozen, batch, trained, Rules.of(trainings, device))


def scales(fine_tunes: list[WideFineTune]) -> Float[Tensor, " m"]:
    """Return the scales of fine-tunes' adapters; 1 where there is none."""
    return torch.tensor([t.alpha / t.rank if t.rank else 1.0 for t in (f.training for f in fine_tunes)])


@torch.no_grad()
def finish(
    fine_tunes: list[WideFineTune], tuning: Tuning, images: PatchedImages, heads: dict[str, bool]
) -> dict[str, np.ndarray]:
    """Train a stack and run it: sketches of changes, responses, the same of altered changes, accuracy with the own head, before and after.

    Of an average of two the other is the stack's next.
    """
    new_heads = [heads[f.name] for f in fine_tunes]
    vectors, scale = train(fine_tunes, tuning, images, new_heads), scales(fine_tunes)
    arrays = {"score_after": scores(fine_tunes, tuning, images, vectors, scale)}
    start = torch.stack([tuning.first(f, False) for f in fine_tunes])
    arrays["score_before"] = scores(fine_tunes, tuning, images, start, scale)
    respond = vmap(tuning.respond, in_dims=(0, None))
    for kind, (sketch, weights) in outcomes(tuning, vectors, scale).items():
        arrays |= {f"{kind}change": sketch, f"{kind}responses": respond(weights, images.references)}
    return {name: value.cpu().numpy() for name, value in arrays.items()}


def outcomes(
    tuning: Tuning, vectors: Float[Tensor, "m v"], scale: Float[Tensor, " m"]
) -> dict[str, tuple[Float[Tensor, "m s"], dict[str, Tensor]]]:
    """Return sketch of the change and weights of networks as they were trained, negated, and each averaged with the next."""
    network, sketch = tuning.network, tuning.sketch
    if tuning.ranks:
        adapters = vmap(tuning.adapters)(vectors, scale.to(vectors))
        forms = {
            "": adapters,
            "negated.": {name: (-b, a) for name, (b, a) in adapters.items()},
            "average_of_two.": {name: averaged(b, a) for name, (b, a) in adapters.items()},
        }
        return {kind: (sketch.of_factors(form), factors(form)) for kind, form in forms.items()}
    start = network.flatten(tuning.base.trained)
    change = vectors[:, : network.size] - start
    moved = {"": change, "negated.": -change, "average_of_two.": (change + change.roll(-1, 0)) / 2}
    return {kind: (sketch.of(network.unflatten(x)), network.unflatten(start + x)) for kind, x in moved.items()}


def averaged(
    b: Float[Tensor, "m o r"], a: Float[Tensor, "m r i"]
) -> tuple[Float[Tensor, "m o q"], Float[Tensor, "m q i"]]:
    """Return the factors of each change averaged with the stack's next."""
    return torch.cat([b, b.roll(-1, 0)], 2) / 2, torch.cat([a, a.roll(-1, 0)], 1)


def scores(
    fine_tunes: list[WideFineTune],
    tuning: Tuning,
    images: PatchedImages,
    vectors: Float[Tensor, "m v"],
    scale: Float[Tensor, " m"],
) -> Float[Tensor, " m"]:
    """Return the accuracy on images of the classes that each fine-tune saw, by its own head."""
    x, y = images.evaluation
    present = torch.stack([torch.from_numpy(f.characteristics["present"]).to(x)[y] for f in fine_tunes])
    answers = vmap(lambda v, s: tuning.logits(tuning.weights(v, s), x))(vectors, scale.to(vectors)).argmax(2)
    return ((answers == y) * present).sum(1) / present.sum(1).clamp(min=1)


def fit_head(base: Base, patches: Float[Tensor, "n p q"], labels: Int[Tensor, " n"]) -> dict[str, Tensor]:
    """Return the head that tells the classes of images from the base's class token: logistic regression on standard features."""
    from sklearn.linear_model import LogisticRegression

    with torch.no_grad():
        tokens = (
            torch.cat([encode(base.encoder, part, base.heads)[:, 0] for part in patches.split(50)])
            .double()
            .cpu()
            .numpy()
        )
    mean, deviation = tokens.mean(0), tokens.std(0) + 1e-6
    model = LogisticRegression(C=1 / len(tokens[0]), max_iter=500).fit(
        (tokens - mean) / deviation, labels.cpu().numpy()
    )
    weight = model.coef_ / deviation
    head = dict(zip(HEAD, (weight, model.intercept_ - weight @ mean), strict=True))
    return {name: torch.from_numpy(values).to(patches) for name, values in head.items()}
