"""Ways to learn tasks one after the other and forget less: penalties on weights or outputs, exemplars, a buffer of old examples."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, normalize, one_hot

from stages.common.randomness import generator
from stages.vit_memory.models import HeadedViT

Batches = Iterable[tuple[Tensor, Any]]


def fisher_diagonal(
    model: nn.Module, batches: Batches, num_classes: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Return the diagonal of the Fisher information of every trainable weight: the mean of squared gradients of single inputs.

    Labels are drawn from the model, as the Fisher information wants, not taken from the data; so the batches' second items are
    not read. Does not depend on how the inputs are batched. num_classes: of the first logits, the ones that compete.
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    random = generator(seed, "labels of the Fisher information")
    total, n = {name: torch.zeros_like(p) for name, p in weights.items()}, 0

    def loss(weights: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (x[None],))[:, :num_classes], label[None])

    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    training = model.training
    model.eval()
    for module in fused:  # timm's name for a kernel that cannot be differentiated for each input
        module.fused_attn = False
    for x, _ in batches:
        with torch.no_grad():
            below = model(x)[:, :num_classes].softmax(1).cumsum(1)
        draws = torch.stack([torch.rand((), generator=random) for _ in x]).to(x.device)  # one by one: any batching
        labels = (below < draws[:, None]).sum(1).clamp(max=below.shape[1] - 1)
        for name, gradients in vmap(grad(loss), (None, 0, 0))(weights, x, labels).items():
            total[name] += gradients.square().sum(0)
        n += len(x)
    for module in fused:
        module.fused_attn = True
    model.train(training)
    return {name: square / n for name, square in total.items()}


class EWC:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796): weights that mattered stay near where they were.

    Made after a task from its `dataloader` (inputs, anything). `previous` adds an earlier task's information, whose anchor is
    left for the new one. num_classes: as in `fisher_diagonal`.
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
        self.model, self.ewc_lambda = model, ewc_lambda
        self.fisher = fisher_diagonal(model, dataloader, num_classes, seed)
        if previous is not None:
            self.fisher = {name: fisher + previous.fisher[name] for name, fisher in self.fisher.items()}
        self.anchor = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def penalty(self) -> Float[Tensor, ""]:
        """Return lambda / 2 times the squared distance from the anchor, weighted by the Fisher information."""
        weights = {name: p for name, p in self.model.named_parameters() if name in self.anchor}
        squares = [(self.fisher[name] * (p - self.anchor[name]).square()).sum() for name, p in weights.items()]
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
        self.model, self.old_model = model, old_model.eval()
        self.alpha, self.temperature, self.num_classes = alpha, temperature, num_classes

    def penalty(self, x: Tensor, logits: Float[Tensor, "n c"] | None = None) -> Float[Tensor, ""]:
        """Return alpha T² KL(old, new) of the softened outputs; `logits` are the model's of x if they are known already.

        T² keeps the gradient's size independent of the temperature (Hinton et al. 2015, arXiv:1503.02531).
        """
        t, known = self.temperature, slice(self.num_classes)
        with torch.no_grad():
            old = (self.old_model(x)[:, known] / t).log_softmax(1)
        new = ((self.model(x) if logits is None else logits)[:, known] / t).log_softmax(1)
        return self.alpha * t**2 * kl_div(new, old, reduction="batchmean", log_target=True)


class ReplayBuffer:
    """A uniform sample of a stream, of fixed size (reservoir sampling, Vitter 1985)."""

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity, self.seen = capacity, 0
        self.images: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.random = generator(seed, "replay buffer")

    def add(self, images: Float[Tensor, "n ..."], labels: Int[Tensor, " n"]) -> None:
        """Offer each example once; whatever has been offered is held with the same probability."""
        for image, label in zip(images, labels, strict=True):
            if len(self.images) < self.capacity:
                self.images.append(image)
                self.labels.append(label)
            elif (place := int(torch.randint(self.seen + 1, (), generator=self.random))) < self.capacity:
                self.images[place], self.labels[place] = image, label
            self.seen += 1

    def sample(self, n: int) -> tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]:
        """Return n of the examples, drawn with replacement."""
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
        self.model, self.num_classes, self.memory_size = model, num_classes, memory_size
        self.exemplars: dict[int, Tensor] = {}
        self.old_model: nn.Module | None = None

    def begin(self) -> None:
        """Remember the model as it is before a task, if it knows any class."""
        self.old_model = copy.deepcopy(self.model).eval() if self.exemplars else None

    def replayed(self) -> tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]:
        """Return all exemplars and their labels; at least one class must have been kept."""
        labels = [torch.full((len(x),), label, device=x.device) for label, x in self.exemplars.items()]
        return torch.cat(list(self.exemplars.values())), torch.cat(labels)

    def loss(self, x: Tensor, labels: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
        """Return the binary cross-entropy of new classes to their labels, and of old ones to the old model's outputs.

        It is summed over classes and averaged over images; classes that nobody has seen have no part in it.
        """
        known = sorted(self.exemplars)
        classes = sorted({*known, *labels.tolist()})
        targets = one_hot(labels, self.num_classes).to(logits)
        if self.old_model is not None:
            with torch.no_grad():
                targets[:, known] = self.old_model(x)[:, known].sigmoid()
        return len(classes) * binary_cross_entropy_with_logits(logits[:, classes], targets[:, classes])

    @torch.no_grad()
    def keep(self, images: dict[int, Float[Tensor, "n ..."]]) -> None:
        """Keep exemplars of new classes, by label, and shorten the old ones' lists, so that all classes have equal shares."""
        self.model.eval()
        share = self.memory_size // (len(self.exemplars) + len(images))
        self.exemplars = {label: kept[:share] for label, kept in self.exemplars.items()}
        for label, x in images.items():
            self.exemplars[label] = x[herd(normalize(self.model.features(x), dim=1), share)]

    @torch.no_grad()
    def classify(self, x: Tensor) -> Float[Tensor, "n c"]:
        """Return the cosine to each class's mean of normalised exemplars; -inf of classes without exemplars."""
        self.model.eval()
        scores = torch.full((len(x), self.num_classes), -torch.inf, device=x.device)
        features = normalize(self.model.features(x), dim=1)
        for label, kept in self.exemplars.items():
            mean = normalize(self.model.features(kept), dim=1).mean(0)
            scores[:, label] = features @ normalize(mean, dim=0)
        return scores
