"""What fine-tunes of a base learn, and how they answer: functions of one network's vector of weights.

Axes: w weights of a network, b images of a batch, n reference inputs, p patches, k of them visible, q pixels of a patch,
c logits, d dimensions of a token, r responses.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear

from stages.common.randomness import generator
from stages.common.vectors import Layout
from stages.recall.functional_vit import FIXED, HEAD, Base, Weights, encode, reconstruct, visible_patches

Learns = Literal["labels", "pixels", "rule"]

HEAD_SCALE = (
    4.0  # of the logits of random heads: as far from 0 as those of trained ones, so that a fine-tune has to move
)


@dataclass(frozen=True)
class Objective:
    """A frozen head, or decoder, behind the encoder that is fine-tuned.

    `labels` are classified by the base's head from the class token; `pixels` of hidden patches are filled in by its decoder;
    a `rule` is answered, yes above 0, by a random head from the mean token.
    """

    base: Base
    learns: Learns
    mask_ratio: float  # of the patches, while training

    @property
    def layout(self) -> Layout:
        """How a vector of weights is cut."""
        return self.base.layout

    @property
    def start(self) -> Float[Tensor, " w"]:
        """The base's weights."""
        return self.base.start

    @cached_property
    def frozen(self) -> Weights:
        """What the network computes with but does not train: fixed positions, and a head if it has one."""
        base = self.base
        head = {name: base.decoder[name] for name in HEAD} if self.learns == "labels" else {}
        if self.learns == "rule":
            head = random_head(1, base, generator(0, "head of rules"))
        return {FIXED: base.encoder[FIXED], **head}

    def network(self, vector: Float[Tensor, " w"], frozen: Weights) -> Weights:
        """Return all that a network computes with."""
        return {**self.layout.unflatten(vector), **frozen}

    def read_out(
        self, w: Weights, patches: Float[Tensor, "b p q"], visible: Int[Tensor, "b k"] | None = None
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b d"]]:
        """Return the head's logits, none if there is no head, and the mean token."""
        tokens = encode(w, patches, self.base.heads, visible)
        cls, mean = tokens[:, 0], tokens.mean(1)
        if self.learns == "pixels":
            return mean[:, :0], mean
        return linear(mean if self.learns == "rule" else cls, *(w[name] for name in HEAD)), mean

    def loss(
        self,
        vector: Float[Tensor, " w"],
        frozen: Weights,
        patches: Float[Tensor, "b p q"],
        labels: Int[Tensor, " b"],
        noise: Float[Tensor, "b p"],
    ) -> Float[Tensor, ""]:
        """Return the loss of a batch; the patches of the largest noise are hidden."""
        w = self.network(vector, frozen)
        if self.learns == "pixels":
            return self.errors(w, patches, noise).mean()
        logits, _ = self.read_out(w, patches, visible_patches(noise, self.mask_ratio) if self.mask_ratio else None)
        if self.learns == "rule":
            return binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits))
        return cross_entropy(logits, labels)

    def errors(self, w: Weights, patches: Float[Tensor, "b p q"], noise: Float[Tensor, "b p"]) -> Float[Tensor, " b"]:
        """Return each image's mean squared error over the pixels of hidden patches."""
        filled, hidden = reconstruct(w, self.base.decoder, patches, self.base.heads, noise, self.mask_ratio)
        return ((filled - patches).square().mean(2) * hidden).sum(1) / hidden.sum(1)

    def scores(
        self,
        vector: Float[Tensor, " w"],
        frozen: Weights,
        patches: Float[Tensor, "b p q"],
        labels: Int[Tensor, " b"],
        noise: Float[Tensor, "b p"],
    ) -> Float[Tensor, " b"]:
        """Return of each image whether it is answered right, seen whole; or the error of its hidden patches."""
        w = self.network(vector, frozen)
        if self.learns == "pixels":
            return self.errors(w, patches, noise)
        logits, _ = self.read_out(w, patches)
        answers = logits[:, 0] > 0 if self.learns == "rule" else logits.argmax(1)
        return (answers == labels).float()

    def respond(
        self, vector: Float[Tensor, " w"], frozen: Weights, references: Float[Tensor, "n p q"]
    ) -> Float[Tensor, " r"]:
        """Return all that one can learn of the network without its weights: logits and mean tokens, of whole images."""
        w = self.network(vector, frozen)
        return torch.cat([part.flatten() for part in self.read_out(w, references)])


def random_head(classes: int, base: Base, random: torch.Generator) -> Weights:
    """Return the weights of a head whose logits have a standard deviation of HEAD_SCALE."""
    d = len(base.encoder["norm.weight"])
    weight = torch.randn(classes, d, generator=random) * HEAD_SCALE / d**0.5
    return dict(zip(HEAD, (weight.to(base.encoder["norm.weight"]), torch.zeros(classes).to(weight)), strict=True))


def random_start(layout: Layout, random: torch.Generator) -> Float[Tensor, " w"]:
    """Return random first weights of an encoder: Glorot's for matrices, norms that do nothing, biases of zero."""
    parts = []
    for name, shape in layout.shapes.items():
        fans = shape[0] + math.prod(shape[1:])
        matrix = torch.randn(shape, generator=random) * (2 / fans) ** 0.5
        constant = torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        parts.append(matrix if len(shape) > 1 else constant)
    return layout.flatten(dict(zip(layout.shapes, parts, strict=True)))
