"""Methods that forget less when tasks come one after the other: penalties on weights or outputs, a buffer, exemplars.

Axes: n inputs, c classes, d features.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, normalize, one_hot

from stages.common.randomness import generator
from stages.vit_memory.checks import check_labels, check_positive
from stages.vit_memory.models import HeadedViT

Batches = Iterable[tuple[Tensor, Any]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have the model in evaluation mode within the block, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def differentiable_attention(model: nn.Module) -> Iterator[None]:
    """Have timm's attention within the block without its fused kernel, which cannot be differentiated for each input."""
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def competing(logits: object, num_classes: int | None) -> Float[Tensor, "n c"]:
    """Return the first `num_classes` logits (None: all); ValueError if there are no logits, or fewer."""
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected it to return logits [n, c], got {got}")
    if num_classes is not None and not 1 <= num_classes <= logits.shape[1]:
        raise ValueError(f"num_classes: expected 1 to the model's {logits.shape[1]} logits, got {num_classes}")
    return logits[:, :num_classes]


def inputs_of(batch: object) -> Tensor:
    """Return a batch's inputs, its first item; ValueError if it is no pair or longer tuple that starts with a tensor."""
    if not isinstance(batch, tuple | list) or not batch or not isinstance(batch[0], Tensor):
        raise ValueError(
            f"dataloader: expected batches (inputs, anything), inputs a tensor, got {type(batch).__name__}"
        )
    return batch[0]


def of_single_inputs(
    gradient: Callable[[dict[str, Tensor], Tensor, Tensor], dict[str, Tensor]],
    weights: dict[str, Tensor],
    x: Float[Tensor, "n *s"],
    labels: Int[Tensor, " n"],
) -> dict[str, Float[Tensor, "n *w"]]:
    """Return the gradient of every input, stacked: of all at once, or one by one where the model's forward branches on its values."""
    try:
        return vmap(gradient, (None, 0, 0))(weights, x, labels)
    except RuntimeError as error:
        if "data-dependent control flow" not in str(error):
            raise
    single = [gradient(weights, x[i], labels[i]) for i in range(len(x))]
    return {name: torch.stack([gradients[name] for gradients in single]) for name in weights}


def fisher_diagonal(
    model: nn.Module, batches: Batches, num_classes: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information of every trainable weight: the mean of squared gradients of single inputs.

    Labels are drawn from the model, as the Fisher information wants, not taken from the data; so no item of a batch but the first
    is read. Does not depend on how the inputs are batched. num_classes: of the first logits, the ones that compete. ValueError
    without weights or inputs.
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not weights:
        raise ValueError("model: expected weights that train, got none: all of its parameters are frozen")
    random = generator(seed, "labels of the Fisher information")
    total, n = {name: torch.zeros_like(p) for name, p in weights.items()}, 0

    def loss(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (x[None],))[:, :num_classes], label[None])

    with evaluating(model), differentiable_attention(model):
        for batch in batches:
            x = inputs_of(batch)
            with torch.no_grad():
                below = competing(model(x), num_classes).softmax(1).cumsum(1)
            draws = torch.stack([torch.rand((), generator=random) for _ in x]).to(x.device)  # one by one: any batching
            labels = (below < draws[:, None]).sum(1).clamp(max=below.shape[1] - 1)
            for name, gradients in of_single_inputs(grad(loss), weights, x, labels).items():
                total[name] += gradients.square().sum(0)
            n += len(x)
    if n == 0:
        raise ValueError(
            "dataloader: expected at least one batch, got none: it is empty, or a generator that is used up"
        )
    return {name: square / n for name, square in total.items()}


def rows_known(name: str, now: Tensor, known: Tensor) -> Tensor:
    """Return the rows that a weight had before: all, or the first if it has grown, as a head does that gets new classes.

    ValueError if it has changed in any other way.
    """
    if now.shape == known.shape:
        return now
    if known.ndim == 0 or now.shape[1:] != known.shape[1:] or len(now) < len(known):
        was, got = list(known.shape), list(now.shape)
        raise ValueError(f"{name}: expected the shape {was} that EWC saw, or more rows of as many numbers, got {got}")
    return now[: len(known)]


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796): weights that mattered stay near where they were.

    Made after a task from its `dataloader` (inputs, anything). `previous` adds an earlier task's information, whose anchor is
    left for the new one. num_classes: as in `fisher_diagonal`. Weights that come later, among them the rows that a head gains for
    new classes, are free until the next EWC is made.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Batches,
        ewc_lambda: float = 1000.0,
        previous: "EWC | None" = None,
        num_classes: int | None = None,
        seed: int = 0,
    ) -> None:
        if ewc_lambda < 0:
            raise ValueError(f"ewc_lambda: expected at least 0, got {ewc_lambda}")
        self.model, self.ewc_lambda = model, ewc_lambda
        self.fisher = fisher_diagonal(model, dataloader, num_classes, seed)
        self.anchor = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        if previous is not None:
            previous.check_names(model)
            for name in self.fisher.keys() & previous.fisher.keys():
                rows_known(name, self.fisher[name], previous.fisher[name]).add_(previous.fisher[name])

    def check_names(self, model: nn.Module) -> None:
        """ValueError if a weight that this knows is no more in the model, by its name."""
        if missing := sorted(self.anchor.keys() - dict(model.named_parameters()).keys()):
            raise ValueError(
                f"model: expected the {len(self.anchor)} weights that EWC saw, got a model without {missing}"
            )

    def penalty(self) -> Float[Tensor, ""]:
        """Return lambda / 2 times the squared distance from the anchor, weighted by the Fisher information."""
        self.check_names(self.model)
        weights = {name: p for name, p in self.model.named_parameters() if name in self.anchor}
        distances = {name: rows_known(name, p, self.anchor[name]) - self.anchor[name] for name, p in weights.items()}
        squares = [(self.fisher[name] * distance.square()).sum() for name, distance in distances.items()]
        return self.ewc_lambda / 2 * torch.stack(squares).sum()


class LwF:
    """Learning without forgetting (Li & Hoiem 2016, arXiv:1606.09282): on new images, old classes' outputs stay as they were.

    `old_model` is a copy from before the task; `num_classes` is how many classes it knew (None: all of its logits).
    """

    def __init__(
        self,
        model: nn.Module,
        old_model: nn.Module,
        alpha: float = 1.0,
        temperature: float = 2.0,
        num_classes: int | None = None,
    ) -> None:
        if old_model is model:
            raise ValueError(
                "old_model: expected a copy from before the task, copy.deepcopy(model), got the model itself"
            )
        if alpha < 0:
            raise ValueError(f"alpha: expected at least 0, got {alpha}")
        check_positive(temperature=temperature)
        self.model, self.old_model = model, old_model.eval()
        self.alpha, self.temperature, self.num_classes = alpha, temperature, num_classes

    def penalty(self, x: Tensor, logits: Float[Tensor, "n c"] | None = None) -> Float[Tensor, ""]:
        """Return alpha T² KL(old, new) of the softened outputs; `logits` are the model's of x if they are known already.

        T² keeps the gradient's size independent of the temperature (Hinton et al. 2015, arXiv:1503.02531).
        """
        t = self.temperature
        with torch.no_grad():
            before = competing(self.old_model(x), self.num_classes)
        now = competing(self.model(x) if logits is None else logits, before.shape[1])
        old, new = (before / t).log_softmax(1), (now / t).log_softmax(1)
        return self.alpha * t**2 * kl_div(new, old, reduction="batchmean", log_target=True)


class ReplayBuffer:
    """A uniform sample of a stream, of fixed size (reservoir sampling, Vitter 1985)."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        self.capacity, self.seen = capacity, 0
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.random = generator(seed, "replay buffer")

    def add(self, images: Float[Tensor, "n ..."], labels: Int[Tensor, " n"]) -> None:
        """Offer each example once; whatever has been offered is held with the same probability."""
        if len(images) != len(labels):
            raise ValueError(f"labels: expected one for each of {len(images)} images, got {len(labels)}")
        for image, label in zip(images, labels, strict=True):
            if len(self.images) < self.capacity:
                self.images.append(image.clone())  # a view would hold the whole batch, and change with it
                self.labels.append(label.clone())
            elif (place := int(torch.randint(self.seen + 1, (), generator=self.random))) < self.capacity:
                self.images[place], self.labels[place] = image.clone(), label.clone()
            self.seen += 1

    def sample(self, n: int) -> tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]:
        """Return n of the examples, drawn with replacement; ValueError if there are none."""
        if not self.images or n < 1:
            raise ValueError(f"sample: expected 1 or more of 1 or more examples, got {n} of {len(self.images)}")
        index = torch.randint(len(self.images), (n,), generator=self.random).tolist()
        return torch.stack([self.images[i] for i in index]), torch.stack([self.labels[i] for i in index])


def herd(features: Float[Tensor, "n d"], count: int) -> list[int]:
    """Return which features to keep, in order, so that the mean of the first k is near the mean of all (iCaRL, algorithm 4)."""
    target, total = features.mean(0), torch.zeros_like(features[0])
    chosen: list[int] = []
    for k in range(1, min(count, len(features)) + 1):
        distance = (target - (total + features) / k).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return chosen


class iCaRL:
    """Incremental classifier and representation learning (Rebuffi et al. 2017, arXiv:1611.07725).

    Exemplars of each class, chosen by herding, are trained on with every new task, and their means classify. Before a task,
    `begin`; while training on its images and `replayed()`, `loss`; after it, `keep` each new class's images.
    """

    def __init__(self, model: HeadedViT, num_classes: int, memory_size: int = 2000) -> None:
        if not callable(getattr(model, "features", None)):
            raise ValueError(f"model: expected one with a method features(x), got {type(model).__name__}")
        if not 1 <= num_classes <= memory_size:
            got = f"{memory_size} for {num_classes}"
            raise ValueError(f"memory_size: expected an exemplar or more for each of 1 or more classes, got {got}")
        self.model, self.num_classes, self.memory_size = model, num_classes, memory_size
        self.exemplars: dict[int, Tensor] = {}
        self.old_model: nn.Module | None = None

    def check_exemplars(self) -> None:
        """ValueError if no class has been kept yet."""
        if not self.exemplars:
            raise ValueError("exemplars: expected those of a class or more, got none: call keep() after each task")

    def begin(self) -> None:
        """Remember the model as it is before a task, if it knows any class."""
        self.old_model = copy.deepcopy(self.model).eval() if self.exemplars else None

    def replayed(self) -> tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]:
        """Return all exemplars and their labels; ValueError if no class has been kept."""
        self.check_exemplars()
        labels = [torch.full((len(x),), label, device=x.device) for label, x in self.exemplars.items()]
        return torch.cat(list(self.exemplars.values())), torch.cat(labels)

    def loss(self, x: Tensor, labels: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        """Return the binary cross-entropy of new classes to their labels, and of old ones to the old model's outputs.

        It is summed over classes and averaged over images; classes that nobody has seen have no part in it.
        """
        check_labels(labels, len(x), self.num_classes)
        known = sorted(self.exemplars)
        classes = sorted({*known, *labels.tolist()})
        targets = one_hot(labels, self.num_classes).to(logits)
        if self.old_model is not None:
            with torch.no_grad():
                targets[:, known] = self.old_model(x)[:, known].sigmoid()
        return len(classes) * binary_cross_entropy_with_logits(logits[:, classes], targets[:, classes])

    @torch.no_grad()
    def keep(self, images: dict[int, Float[Tensor, "n ..."]]) -> None:
        """Keep exemplars of new classes, by label, and shorten the old ones' lists, so that all classes have as many."""
        for label, x in images.items():
            if not 0 <= label < self.num_classes or len(x) == 0:
                expected = f"labels of 0 to {self.num_classes - 1}, each with an image or more"
                raise ValueError(f"images: expected {expected}, got {len(x)} of label {label}")
        count = self.memory_size // max(1, len(self.exemplars.keys() | images.keys()))
        self.exemplars = {label: kept[:count] for label, kept in self.exemplars.items()}
        with evaluating(self.model):
            for label, x in images.items():
                self.exemplars[label] = x[herd(normalize(self.model.features(x), dim=1), count)]

    @torch.no_grad()
    def classify(self, x: Tensor) -> Float[Tensor, "n c"]:
        """Return the cosine to each class's mean of normalised exemplars; -inf of classes without exemplars."""
        self.check_exemplars()
        scores = torch.full((len(x), self.num_classes), -torch.inf, device=x.device)
        with evaluating(self.model):
            features = normalize(self.model.features(x), dim=1)
            for label, kept in self.exemplars.items():
                mean = normalize(self.model.features(kept), dim=1).mean(0)
                scores[:, label] = features @ normalize(mean, dim=0)
        return scores
