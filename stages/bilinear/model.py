"""The bilinear image classifier: logits = head(B(...B(embed(x)))), with blocks B(h) = (L h) * (R h).

Pearce et al. 2024, "Bilinear MLPs enable weight-based mechanistic interpretability", arXiv:2410.08417, section 3.

Axes: b images, h hidden units.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stages.common.randomness import generator

Config = dict[str, Any]  # of a network, of its training, or of both: see build_image_classifier and training.py


class Bilinear(nn.Linear):
    """h -> (L h + l) * (R h + r), elementwise; L, l are the first half of `weight`, `bias`, and R, r the second."""

    def __init__(self, d_hidden: int, bias: bool) -> None:
        super().__init__(d_hidden, 2 * d_hidden, bias=bias)

    def forward(self, h: Float[Tensor, "*b h"]) -> Float[Tensor, "*b h"]:
        left, right = super().forward(h).chunk(2, dim=-1)
        return left * right


class BilinearImageClassifier(nn.Module):
    """A classifier of flattened images without a nonlinearity other than products of two linear maps.

    d_input: pixels times channels. d_output: classes. n_layer: bilinear blocks. bias: in the blocks. residual: h + B(h)
    instead of B(h). seed: of the initial weights, drawn as nn.Linear draws them but from a generator of their own.
    """

    def __init__(
        self, d_input: int, d_hidden: int, d_output: int, n_layer: int, bias: bool, residual: bool, seed: int
    ) -> None:
        super().__init__()
        if min(d_input, d_hidden, d_output) < 1 or n_layer < 0:
            got = f"{d_input}, {d_hidden}, {d_output} and {n_layer} layers"
            raise ValueError(f"expected d_input, d_hidden and d_output of 1 or more and 0 or more layers, got {got}")
        self.residual = residual
        self.embed = nn.Linear(d_input, d_hidden, bias=False)
        self.blocks = nn.ModuleList([Bilinear(d_hidden, bias) for _ in range(n_layer)])
        self.head = nn.Linear(d_hidden, d_output, bias=False)
        random = generator(seed, "bilinear weights")
        with torch.no_grad():
            for layer in (self.embed, *self.blocks, self.head):
                for parameter in layer.parameters():
                    bound = layer.in_features**-0.5
                    parameter.uniform_(-bound, bound, generator=random)

    def forward(self, x: Float[Tensor, "b *chw"]) -> Float[Tensor, "b d_output"]:
        """Return the logits of images in any shape with d_input numbers an image."""
        return self.read_hidden(self.embed(x.flatten(1)))

    def read_hidden(self, h: Float[Tensor, "b h"]) -> Float[Tensor, "b d_output"]:
        """Return the logits of embedded images."""
        for block in self.blocks:
            h = h + block(h) if self.residual else block(h)
        return self.head(h)

    @property
    def embedding_weight(self) -> Float[Tensor, "h d_input"]:
        """The embedding E, detached."""
        return self.embed.weight.detach()

    @property
    def output_weight(self) -> Float[Tensor, "d_output h"]:
        """The head U, detached."""
        return self.head.weight.detach()

    @property
    def bilinear_weights(self) -> Float[Tensor, "n_layer 2 h h"]:
        """L and R of every block, detached."""
        return torch.stack([torch.stack(block.weight.detach().chunk(2)) for block in self.blocks])

    @property
    def bilinear_biases(self) -> Float[Tensor, "n_layer 2 h"]:
        """l and r of every block, detached; zeros where there is no bias."""
        biases = [
            block.weight.new_zeros(2 * block.in_features) if block.bias is None else block.bias.detach()
            for block in self.blocks
        ]
        return torch.stack([torch.stack(bias.chunk(2)) for bias in biases])


def build_image_classifier(model_cfg: Config, seed: int) -> BilinearImageClassifier:
    """Return the classifier of `model_cfg` (d_input, d_hidden, d_output, n_layer, bias, residual), initialised from `seed`."""
    return BilinearImageClassifier(**model_cfg, seed=seed)
