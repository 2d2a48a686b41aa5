"""A reader that runs a network on inputs which it learns."""

import torch
from torch import nn
from torch.nn.functional import log_softmax

from stages.weightnet.predictors.layers import Features, two_layers
from stages.weightnet.tracing.program import run_stack
from stages.weightnet.zoo.networks import Networks


class Probe(nn.Module):
    """Networks of any architecture -> features [n, 64] of their answers to inputs that are learned.

    The inputs come from a linear generator (ProbeGen, Kahana et al. 2024, arXiv:2410.10811): a deep linear map keeps them smooth.
    """

    def __init__(self, classes: int, channels: int, side: int, probes: int) -> None:
        super().__init__()
        quarter = -(-side // 4)
        self.code = nn.Parameter(torch.randn(probes, 16, 1, 1))
        self.generate = nn.Sequential(
            nn.ConvTranspose2d(16, 32, quarter),
            nn.ConvTranspose2d(32, 16, 4, 2, 1),
            nn.ConvTranspose2d(16, channels, 4, 2, 1),
        )
        self.read = two_layers(probes * classes)
        self.side = side

    def forward(self, networks: Networks) -> Features:
        inputs = self.generate(self.code)[:, :, : self.side, : self.side]
        answers = run_stack(networks.program, networks.weights, inputs, networks.tanh)
        return self.read(log_softmax(answers, -1).flatten(1))
