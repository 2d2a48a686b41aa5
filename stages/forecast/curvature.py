"""How far movements of weights move a network's outputs: a quadratic form for each of its tensors, factored as K-FAC has it.

A layer with inputs a answers a movement D of its weights by D a; the outputs then move by g . D a, g their gradients. Over images,
E (g . D a)^2 is about tr(G D A D^T) with A = E a a^T and G = E g g^T: Martens and Grosse 2015, arXiv:1503.05671, section 3; of
convolutions, summed over positions as if these were independent: Grosse and Martens 2016, arXiv:1602.01407, section 3. What
several layers do together is left out. G is that of one random combination of the outputs, whose mean is the sum over all of them.

Axes: k movements, n weights of a tensor, o outputs of a layer, i its inputs, b images, t positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import unfold

from stages.common.vectors import Layout


@dataclass(frozen=True)
class Factors:
    """A and G of a tensor; a bias or a norm's weight, whose input is one number, has no A."""

    inputs: Float[Tensor, "i i"] | None
    outputs: Float[Tensor, "o o"]

    def times(self, movements: Float[Tensor, "k n"]) -> Float[Tensor, "k n"]:
        """Return G D A of each movement D: its product with another is their form."""
        parts = self.outputs @ movements.unflatten(1, (len(self.outputs), -1))
        return (parts if self.inputs is None else parts @ self.inputs).flatten(1)


def output_factors(
    network: nn.Module, layout: Layout, weights: Float[Tensor, " p"], images: Tensor, random: torch.Generator
) -> list[Factors]:
    """Return the factors of each tensor of a network of linear layers, convolutions and batch norms; ValueError of another."""
    tensors = {name: x.clone().requires_grad_() for name, x in layout.unflatten(weights).items()}
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, (module, inputs[0].detach(), output))

    layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.BatchNorm2d))}
    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        logits = functional_call(network.train(), tensors, (images,))
    finally:
        for handle in handles:
            handle.remove()
    signs = 2.0 * torch.randint(2, logits.shape, generator=random) - 1
    gradients = torch.autograd.grad((signs * logits).sum(), [output for _, _, output in seen.values()])
    known: dict[str, Factors] = {}
    for (name, (module, a, output)), g in zip(seen.items(), gradients, strict=True):
        known[f"{name}.bias"] = Factors(None, second_moment(g.flatten(2).sum(2) if g.dim() > 2 else g))
        if isinstance(module, nn.BatchNorm2d):
            scale, shift = (tensors[f"{name}.{x}"].detach()[:, None, None] for x in ("weight", "bias"))
            normed = (output.detach() - shift) / torch.where(scale == 0, 1.0, scale)
            known[f"{name}.weight"] = Factors(None, second_moment((g * normed).flatten(2).sum(2)))
        else:
            known[f"{name}.weight"] = of_matrix(module, a, g)
    if missing := [name for name in layout.shapes if name not in known]:
        raise ValueError(f"expected weights of linear layers, convolutions and batch norms alone, got {missing[0]}")
    return [known[name] for name in layout.shapes]


def of_matrix(layer: nn.Module, a: Tensor, g: Tensor) -> Factors:
    """Return the factors of the weight of a linear layer or a convolution from its inputs and the gradients of its outputs."""
    if not isinstance(layer, nn.Conv2d):
        return Factors(second_moment(a), second_moment(g))
    patches = unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT  # [b, t, i]
    by_position = g.flatten(2).mT  # [b, t, o]
    return Factors(
        second_moment(patches.flatten(0, 1)), by_position.shape[1] * second_moment(by_position.flatten(0, 1))
    )


def second_moment(x: Float[Tensor, "b i"]) -> Float[Tensor, "i i"]:
    """Return E x x^T."""
    return x.T @ x / len(x)
