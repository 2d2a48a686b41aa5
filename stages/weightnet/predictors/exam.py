"""An exam that a zoo writes for itself: no image of a data set is in it, and no label.

draw    inputs start as drawn glyphs and follow the gradient of what committees of the zoo's better networks call a class
sit     every network answers five papers: the drawn inputs, noisy copies, copies moved against its own margin, the glyphs, noise
mark    its answers are compared with the mean answer of the better networks, the consensus, and among each other
learn   kernel ridge from the marks to the properties (`kernel_ridge`)

Marks are functions of outputs: they are the same for all relabellings and rescalings of neurons, and comparable between all
architectures of the same inputs and classes. Axes: n networks, b inputs, k classes, m marks of a paper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from stages.common.drawings import Glyphs
from stages.common.randomness import generator
from stages.common.stage import StageParams
from stages.weightnet.tracing.program import run_stack
from stages.weightnet.zoo.networks import Networks, stacked

PAPERS = ("drawn", "noisy", "attacked", "glyphs", "noise")
KEY = (0, 0, 0, 1, 2)  # the consensus that each paper is marked by: on the drawn inputs, the glyphs, the noise
CHARACTERS, FINER = 64, 4  # kinds of glyphs, and how much finer they are drawn than the inputs
QUARTERS = 4  # of the inputs, from those the better networks agree on least to those they agree on most
SURPRISE = 12.0  # nats: no answer counts as more wrong
SPECTRUM = 8  # directions in which a network's answers differ


class ExamParams(StageParams):
    """How the exam is drawn. Inputs are in units of the zoo's images."""

    inputs: PositiveInt  # of a paper
    grid: PositiveInt  # points of a side on which inputs are drawn, at most: finer images are smooth, as real ones are
    committees: PositiveInt  # that draw a share of them each
    members: PositiveInt  # of a committee
    better: PositiveFloat  # share of the networks learned from whose mean answer is the consensus
    steps: list[PositiveInt]  # of a quarter of the inputs each, so that some are hard and some easy
    rate: PositiveFloat
    jitter: NonNegativeFloat
    decay: NonNegativeFloat
    noise: PositiveFloat  # of the noisy copies
    attack: PositiveFloat  # against the margin
    drawings: PositiveInt  # of the main architecture's exam: one predicts, the others say what chance does

    @model_validator(mode="after")
    def check_shares(self) -> Self:
        """Every committee draws as many inputs."""
        if self.inputs % self.committees:
            raise ValueError(f"inputs: expected a multiple of the {self.committees} committees, got {self.inputs}")
        return self


@dataclass(frozen=True)
class Exam:
    """Three sheets of inputs (drawn, glyphs, noise), and the better networks' mean answers to them."""

    inputs: Float[Tensor, "3 b c h w"]
    consensus: Float[Tensor, "3 b k"]
    noise: float
    attack: float


def draw_glyphs(channels: int, side: int, n: int, random: torch.Generator) -> Float[Tensor, "n c s s"]:
    """Return images of Bézier strokes around 0, with a deviation of 1."""
    ink = Glyphs(CHARACTERS).draw(torch.arange(n) % CHARACTERS, FINER * side, random).float()
    small = avg_pool2d(ink, FINER).expand(-1, channels, -1, -1)
    return (small - small.mean()) / small.std()


def draw_by(
    committees: Sequence[Sequence[Networks]],
    start: Float[Tensor, "g b c h w"],
    labels: Int[Tensor, "g b"],
    jitter: Sequence[Float[Tensor, "g _ c h w"]],
    params: ExamParams,
) -> Float[Tensor, "g b c h w"]:
    """Return inputs that g committees of as many networks take for the labels, some barely (few steps of Adam) and some surely (many).

    start: on the grid, from which the committees' inputs are made smooth; jitter: of what is still drawn at each step, in deviations.
    """
    (_, side, _) = committees[0][0].program.input_shape
    stops, members = sorted(params.steps), sum(map(len, committees[0]))
    stacks = stack_alike(committees)
    parts = [part.clone().requires_grad_() for part in start.tensor_split(len(stops), 1)]
    targets = labels.tensor_split(len(stops), 1)
    optimizer = torch.optim.Adam(parts, params.rate)
    for step in range(stops[-1]):
        going = [i for i, stop in enumerate(stops) if step < stop]
        x, target = torch.cat([parts[i] for i in going], 1), torch.cat([targets[i] for i in going], 1)
        seen = smooth(x + params.jitter * jitter[step], side)
        loss = params.decay * x.square().sum()
        for some, whose in stacks:
            logits = run_stack(some.program, some.weights, seen[whose], some.tanh)
            loss = loss + cross_entropy(logits.flatten(0, 1), target[whose].flatten(), reduction="sum") / members
        optimizer.zero_grad()  # to None: what has stopped stays where it is
        loss.backward()
        optimizer.step()
    return smooth(torch.cat(parts, 1).detach(), side)


def stack_alike(committees: Sequence[Sequence[Networks]]) -> list[tuple[Networks, Int[Tensor, " n"]]]:
    """Return the networks of several committees, those of one architecture stacked, and which committee each is of.

    Small stacks take almost as long as large ones, and those whose activations alternate longer.
    """
    alike: dict[int, list[tuple[Networks, Tensor]]] = {}
    for number, committee in enumerate(committees):
        for some in committee:
            alike.setdefault(id(some.program), []).append((some, torch.full((len(some),), number)))
    found = []
    for own in alike.values():
        stack, whose = stacked([some for some, _ in own]), torch.cat([numbers for _, numbers in own])
        order = stack.tanh.int().argsort(stable=True)
        found.append((stack.subset(order), whose[order]))
    return found


def jitter_of(
    start: Float[Tensor, "b c h w"], steps: Sequence[int], random: torch.Generator
) -> list[Float[Tensor, "_ c h w"]]:
    """Return the noise of every step for those of a committee's inputs that are still drawn then."""
    sizes = [len(part) for part in start.tensor_split(len(steps))]
    going = [sum(size for size, stop in zip(sizes, steps, strict=True) if step < stop) for step in range(steps[-1])]
    return [torch.randn(count, *start.shape[1:], generator=random) for count in going]


def smooth(x: Float[Tensor, "*b c g g"], side: int) -> Float[Tensor, "*b c h h"]:
    """Return images of `side` pixels between whose grid points colours go over linearly."""
    if x.shape[-1] == side:
        return x
    return interpolate(x.flatten(0, -4), size=(side, side), mode="bilinear").unflatten(0, x.shape[:-3])


def draw_exam(
    choose: Callable[[Int[Tensor, " c"]], list[Networks]],
    better: int,
    params: ExamParams,
    drawing: int,
    together: int = 1,
) -> Exam:
    """Draw the inputs, and let the better networks answer them.

    choose: gives networks by their place among the `better` ones; together: committees that draw side by side, as memory allows.
    """
    random = generator(drawing, "exam")
    program = choose(torch.tensor([0]))[0].program
    channels, side, _ = program.input_shape
    glyphs = draw_glyphs(channels, min(side, params.grid), params.inputs, random)
    noise = torch.randn(glyphs.shape, generator=random)
    labels = torch.randperm(params.inputs, generator=random) % program.steps[-1].shape[0]
    starts, targets = (whole.unflatten(0, (params.committees, -1)) for whole in (glyphs, labels))
    committees, jitter = [], []
    for start in starts:
        committees.append(choose(torch.randperm(better, generator=random)[: params.members]))
        jitter.append(jitter_of(start, sorted(params.steps), random))
    drawn = []
    with torch.enable_grad():
        for first in range(0, params.committees, together):
            own = slice(first, first + together)
            noises = [torch.stack(same) for same in zip(*jitter[own], strict=True)]
            drawn.append(draw_by(committees[own], starts[own], targets[own], noises, params).flatten(0, 1))
    inputs = torch.stack([torch.cat(drawn), smooth(glyphs, side), smooth(noise, side)])
    total = torch.zeros(*inputs.shape[:2], program.steps[-1].shape[0])
    for places in torch.arange(better).split(params.members * together):
        for some in choose(places):
            total += torch.stack([asker(some)(sheet).softmax(-1).sum(0) for sheet in inputs])
    return Exam(inputs, total / better, params.noise, params.attack)


Ask = Callable[[Float[Tensor, "b c h w"] | Float[Tensor, "n b c h w"]], Float[Tensor, "n b k"]]


def asker(networks: Networks | nn.Module) -> Ask:
    """Return what gives the logits of some networks, or of one module, on the same inputs or on inputs of each one's own."""
    if isinstance(networks, Networks):
        return lambda inputs: run_stack(networks.program, networks.weights, inputs, networks.tanh)
    return lambda inputs: networks(inputs.flatten(0, -4))[None]


def against_margin(
    ask: Ask, inputs: Float[Tensor, "n b c h w"], step: float
) -> tuple[Float[Tensor, "n b k"], Float[Tensor, "n b c h w"]]:
    """Return the networks' logits, and each one's own inputs, moved by a signed gradient step to where it is less sure.

    As FGSM does (Goodfellow et al. 2015), without a label: down the difference of the two largest logits.
    """
    x = inputs.clone().requires_grad_()
    with torch.enable_grad():
        logits = ask(x)
        first, second = logits.topk(2, -1).values.unbind(-1)
        (gradient,) = torch.autograd.grad((first - second).sum(), x)
    return logits.detach(), (x - step * gradient.sign()).detach()


@torch.no_grad()
def sit(exam: Exam, networks: Networks | nn.Module) -> Float[Tensor, "5 n b k"]:
    """Return the answers of some networks, or of one module, to the five papers, in the precision of their weights."""
    weights = networks.weights.values() if isinstance(networks, Networks) else networks.parameters()
    drawn, glyphs, noise = exam.inputs.to(next(iter(weights)))
    ask, n = asker(networks), len(networks) if isinstance(networks, Networks) else 1
    answers, moved = against_margin(ask, drawn.expand(n, *drawn.shape), exam.attack)
    return torch.stack([answers, *(ask(sheet) for sheet in (drawn + exam.noise * noise, moved, glyphs, noise))])


def mark(exam: Exam, networks: Networks | nn.Module) -> Float[Tensor, "n 5 m"]:
    """Return the networks' marks in the five papers: first those that compare them with the consensus."""
    answers = sit(exam, networks)
    keys = exam.consensus.to(answers)[list(KEY)]
    papers = [torch.cat([agreement(a, key), confidence(a)], 1) for a, key in zip(answers, keys, strict=True)]
    return torch.stack(papers, 1)


AGREEMENT = 5 + 2 * QUARTERS  # marks of a paper that compare answers with the consensus


def agreement(logits: Float[Tensor, "n b k"], key: Float[Tensor, "b k"]) -> Float[Tensor, "n a"]:
    """Return how far answers are those of the consensus: how often and how surely, on easy and on hard inputs.

    The first number is the share of inputs whose most likely class is the consensus's.
    """
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    label, sureness = key.argmax(-1), key.amax(-1)
    right = (logits.argmax(-1) == label).to(p)
    told = log_p.gather(2, label.expand(len(p), -1)[..., None])[..., 0].clamp(min=-SURPRISE)
    quarters = sureness.argsort().chunk(QUARTERS)
    distance = (p - key).square().sum(-1)
    means = [right, told, distance, p.amax(-1) - right, *(x[:, part] for part in quarters for x in (right, told))]
    return torch.stack([*(x.mean(1) for x in means), right.std(1)], 1)


def confidence(logits: Float[Tensor, "n b k"]) -> Float[Tensor, "n c"]:
    """Return how sure and how different answers are, whatever they say: entropies, margins, sizes, and their spectrum."""
    log_p = logits.log_softmax(-1)
    mean = log_p.exp().mean(1)
    mixed = -(mean * mean.clamp(min=1e-9).log()).sum(-1)  # the entropy of the mean answer
    told = mixed + (log_p.exp() * log_p).sum(-1).mean(1)  # what inputs tell of answers: their mutual information
    first, second = logits.topk(2, -1).values.unbind(-1)
    centred = logits - logits.mean(-1, keepdim=True)
    away = centred - centred.mean(1, keepdim=True)
    spectrum = torch.linalg.eigvalsh(away.mT @ away).clamp(min=0).flip(1)[:, :SPECTRUM]
    spectrum = spectrum / spectrum.sum(1, keepdim=True).clamp(min=1e-9)
    sizes = [x.clamp(min=1e-9).log() for x in (away.square().mean((1, 2)), centred.mean(1).square().mean(1))]
    spreads = [spread((first - second).log1p()), spread(centred.norm(dim=-1).log1p()), spectrum]
    return torch.cat([torch.stack([mixed, told, *sizes], 1), *spreads], 1)


def spread(x: Float[Tensor, "n b"]) -> Float[Tensor, "n 5"]:
    """Return mean, deviation and three quantiles of each row."""
    quantiles = torch.quantile(x, x.new_tensor([0.1, 0.5, 0.9]), 1)
    return torch.stack([x.mean(1), x.std(1), *quantiles], 1)


READINGS: dict[str, Callable[[Float[Tensor, "n 5 m"]], Float[Tensor, "n r"]]] = {  # parts of the marks: ablations
    "one_number": lambda marks: marks[:, 0, :1],  # accuracy on the drawn inputs by the consensus's labels
    "drawn_only": lambda marks: marks[:, 0],
    "glyphs_only": lambda marks: marks[:, 3],  # nothing is drawn by gradient
    "noise_only": lambda marks: marks[:, 4],
    "no_consensus": lambda marks: marks[:, :, AGREEMENT:].flatten(1),
}
