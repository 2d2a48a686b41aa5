"""Ways to classify images after having seen a few of each class: `METHODS` is the table of all.

Each is a function (support, queries, settings) -> logits of the queries. To add one, write it and give it a line in a table:
in `THROUGH` if it trains through the backbone, with a learning rate to choose, else in `FROZEN`.

Axes: s support images, q queries, d features, w classes of an episode.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stages.common.backbone import Backbone
from stages.common.randomness import generator, seeded_init
from stages.common.runtime import autocast
from stages.vit_memory.classifiers import (
    RanPAC,
    Whitening,
    centred_cosines,
    class_means,
    linear_probe,
    memory_log_probabilities,
)
from stages.vit_memory.episodes import Episode
from stages.vit_memory.models import HeadedViT, MemoryAugmentedViT, PromptedViT, VPTDeep, VPTShallow

REFERENCE = "linear_probe"  # what all others are compared with

WEIGHT_DECAY = 0.01  # AdamW's default
IMAGES_AT_ONCE = 250  # where nothing is trained


@dataclass(frozen=True)
class Views:
    """Images as the methods may read them: pixels, and the class tokens of the backbone and of a ViT that has learned nothing."""

    images: UInt8[Tensor, "n _ h w"]
    x: Float[Tensor, "n d"]
    random_x: Float[Tensor, "n d"] | None  # None: not at hand, as of base images


@dataclass(frozen=True)
class Examples(Views):
    """The support or the queries of an episode."""

    labels: Int[Tensor, " n"]
    classes: int  # how many there are
    seed: int  # of what a method draws


def shots(episodes: Iterable[Episode], train: Views, test: Views) -> Iterator[tuple[Examples, Examples]]:
    """Yield the support and the queries of each episode."""

    def take(views: Views, index: Int[Tensor, " k"], labels: Int[Tensor, " k"], episode: Episode) -> Examples:
        random_x = None if views.random_x is None else views.random_x[index]
        return Examples(views.images[index], views.x[index], random_x, labels, len(episode.classes), episode.seed)

    for episode in episodes:
        support = take(train, episode.support, episode.support_labels, episode)
        yield support, take(test, episode.queries, episode.query_labels, episode)


@dataclass(frozen=True)
class Training:
    """How to train through the backbone."""

    backbone: Backbone
    num_prompts: int
    beta: float  # of the memory in a block
    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class Settings:
    """What the methods are told beside the images."""

    decay: float  # of the linear probe's weights
    whiten: Whitening
    strength: tuple[float, float]  # beta of the memory head, and the weight of its memory beside the linear probe
    random_features: int
    ridge: float
    plain_learning_rate: float
    plain_steps: int
    training: Training | None  # None: through a backbone that is no ViT nothing is trained

    @property
    def through(self) -> Training:
        """How to train through the backbone; ValueError if it is no ViT."""
        if self.training is None:
            raise ValueError("training: expected how to train through a ViT, got None: methods of FROZEN need none")
        return self.training


# --- on frozen features -------------------------------------------------------------------------------------------------


def plain_linear_probe(support: Examples, queries: Examples, settings: Settings) -> Float[Tensor, "q w"]:
    """A linear head trained as it often is: AdamW on features as they are, for a fixed number of steps."""
    with seeded_init(support.seed):
        head = nn.Linear(support.x.shape[1], support.classes).to(support.x.device)
    optimizer = torch.optim.AdamW(head.parameters(), settings.plain_learning_rate, weight_decay=WEIGHT_DECAY)
    for _ in range(settings.plain_steps):
        loss = cross_entropy(head(support.x), support.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head(queries.x).detach()


def memory_heads(
    support: Examples, queries: Examples, whiten: Whitening, decay: float, strengths: list[tuple[float, float]]
) -> list[Float[Tensor, "q w"]]:
    """Return, for each (beta, weight), the linear probe's log probabilities plus `weight` times those of an associative memory.

    The memory holds the support images in coordinates in which base images have unit covariance.
    """
    keys, x = whiten(support.x), whiten(queries.x)
    probe = linear_probe(keys, support.labels, x, support.classes, decay).log_softmax(1)
    return [
        probe + weight * memory_log_probabilities(keys, support.labels, x, support.classes, beta)
        for beta, weight in strengths
    ]


def memory_head(support: Examples, queries: Examples, settings: Settings) -> Float[Tensor, "q w"]:
    """A linear probe and an associative memory."""
    return memory_heads(support, queries, settings.whiten, settings.decay, [settings.strength])[0]


def whitened_linear_probe(support: Examples, queries: Examples, settings: Settings) -> Float[Tensor, "q w"]:
    """The memory head without its memory."""
    return memory_heads(support, queries, settings.whiten, settings.decay, [(1.0, 0.0)])[0]


def nearest_mean(support: Examples, queries: Examples, _settings: Settings) -> Float[Tensor, "q w"]:
    """The nearest class mean, by cosine."""
    return centred_cosines(class_means(support.x, support.labels, support.classes), queries.x)


def ranpac(support: Examples, queries: Examples, settings: Settings) -> Float[Tensor, "q w"]:
    """Ridge regression on random features."""
    random, x = generator(support.seed, "RanPAC"), support.x
    head = RanPAC(x.shape[1], settings.random_features, support.classes, random, x.device)
    head.write(x, support.labels)
    return head.scores(queries.x, settings.ridge)


def probe_of(read: Callable[[Examples], Float[Tensor, "n d"]]) -> "Method":
    """Return the linear probe of what `read` gives of examples."""

    def method(support: Examples, queries: Examples, settings: Settings) -> Float[Tensor, "q w"]:
        return linear_probe(read(support), support.labels, read(queries), support.classes, settings.decay)

    return method


# --- through the backbone -----------------------------------------------------------------------------------------------


def train_through(build: Callable[[VisionTransformer], HeadedViT], support: Examples, training: Training) -> HeadedViT:
    """Return the model that `build` makes around a copy of the backbone, what trains of it trained on the support images."""
    with seeded_init(support.seed):
        model = build(copy.deepcopy(training.backbone.vit))
    model = model.to(support.labels.device)
    x, labels = training.backbone.prepare(support.images), support.labels
    if isinstance(model, MemoryAugmentedViT):
        with autocast(x.device):
            model.memorise(x, labels)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, training.learning_rate, weight_decay=WEIGHT_DECAY)
    random = generator(support.seed, "few-shot batches")
    for _ in range(training.steps):
        batch = torch.randperm(len(x), generator=random)[: training.batch_size].to(x.device)
        with autocast(x.device):
            logits = model(x[batch])
        loss = cross_entropy(logits.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def predict(model: HeadedViT, backbone: Backbone, images: UInt8[Tensor, "n _ h w"]) -> Float[Tensor, "n w"]:
    """Return the logits of images, batch by batch."""
    with autocast(images.device):
        return torch.cat([model(backbone.prepare(batch)) for batch in images.split(IMAGES_AT_ONCE)]).float()


def prompts_of(kind: type[PromptedViT]) -> "Method":
    """Return the method of training visual prompts of a kind."""

    def method(support: Examples, queries: Examples, settings: Settings) -> Float[Tensor, "q w"]:
        training = settings.through
        model = train_through(
            lambda vit: kind(vit, num_classes=support.classes, num_prompts=training.num_prompts), support, training
        )
        return predict(model, training.backbone, queries.images)

    return method


def memory_block(support: Examples, queries: Examples, settings: Settings) -> Float[Tensor, "q w"]:
    """An associative memory of the support images in the last block."""
    training = settings.through

    def build(vit: VisionTransformer) -> MemoryAugmentedViT:
        return MemoryAugmentedViT(vit, num_classes=support.classes, mem_size=len(support.labels), beta=training.beta)

    model = train_through(build, support, training)
    return predict(model, training.backbone, queries.images)


Method = Callable[[Examples, Examples, Settings], Float[Tensor, "q w"]]

THROUGH: dict[str, Method] = {  # longest first
    "vpt_deep": prompts_of(VPTDeep),
    "vpt_shallow": prompts_of(VPTShallow),
    "memory_block": memory_block,
}
FROZEN: dict[str, Method] = {
    REFERENCE: probe_of(lambda examples: examples.x),
    "plain_linear_probe": plain_linear_probe,
    "whitened_linear_probe": whitened_linear_probe,
    "memory_head": memory_head,
    "nearest_mean": nearest_mean,
    "ranpac": ranpac,
    "random_vit": probe_of(lambda examples: examples.random_x),
    "pixels": probe_of(lambda examples: examples.images.flatten(1).float()),
}
METHODS = THROUGH | FROZEN
