"""Run a frozen network once over a data set, and over images of which nothing is tested: what is chosen is chosen on them.

The network is a ViT of pretrain_backbone, or any of timm's with a file of its weights. Those images are glyphs of classes that
nothing has seen or, for networks that know photographs, training images that are held out: their labels choose a layer and strengths,
and are read for nothing else. A killed run goes on from its pieces in .work/.

Reads   data/<dataset>.safetensors, and the backbone that params.yaml names
Writes  models/extract_features/<dataset>/backbone.safetensors   a copy, for the stages that train through it; of a network that is
            no ViT with a class token its name alone
        models/extract_features/<dataset>/features.safetensors   float32 [n, k, d], class token and mean of patch tokens (of a CNN
            the mean over pixels), of `train`, `test`, `base`, and by random weights of `random_train`, `random_test`; int64
            `*_labels` [n] of the first three; uint8 `base_images`
        reports/extract_features/<dataset>/network.json   which network, the SHA-256 of its weights, and the layer
"""

import copy
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Self

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from safetensors.torch import load_file
from torch import Tensor

from stages.common.backbone import Backbone, BackboneConfig, load_backbone, published_config, save_backbone
from stages.common.drawings import Glyphs
from stages.common.files import atomic_path, require, save_arrays, save_json
from stages.common.images import DATA, ImageSet, load_images
from stages.common.metrics import accuracy
from stages.common.randomness import generator
from stages.common.runtime import pick_device, pin_threads
from stages.common.stage import InputError, StageParams, parse_arguments, run
from stages.common.work import compute_pieces, fingerprint, work_folder
from stages.vit_memory.classifiers import linear_probe
from stages.vit_memory.episodes import Episode, draw_episode
from stages.vit_memory.features import first
from stages.vit_memory.networks import (
    Layer,
    Network,
    build_network,
    check_layer,
    fit_size,
    has_class_token,
    load_published,
)

MODELS = Path("models/extract_features")
REPORTS = Path("reports/extract_features")

DRAWN_AT_ONCE = 500  # glyphs: more leave the processor's cache
PIECE = 250  # images: a run that was killed goes on after the last piece


class GlyphParams(StageParams):
    """Drawings of classes that nothing was trained on."""

    first_class: NonNegativeInt
    classes: PositiveInt
    images: PositiveInt


class NetworkParams(StageParams):
    """A network of timm."""

    name: str
    image_size: PositiveInt  # pixels
    layers: Annotated[list[Layer], Field(min_length=1)]  # to choose from
    mean: tuple[float, float, float] | None  # of its inputs; null: what timm says
    std: tuple[float, float, float] | None

    def config(self) -> BackboneConfig:
        """Return what the network is built by."""
        known = published_config(self.name, self.image_size)
        return replace(known, pretrained=False, mean=self.mean or known.mean, std=self.std or known.std)


class EpisodeParams(StageParams):
    """Episodes among the base images, that a layer is chosen on."""

    n_way: PositiveInt
    n_shot: PositiveInt
    queries: PositiveInt
    episodes: PositiveInt
    decay: NonNegativeFloat  # of the linear probe's weights


class Params(StageParams):
    """Parameters of one data set's features."""

    seed: NonNegativeInt
    backbone: Path  # a file of pretrain_backbone, or a released one; or of the weights of `network`
    network: str | None  # one of `networks`
    networks: dict[str, NetworkParams]
    layer_episodes: EpisodeParams
    train_images: PositiveInt  # the first, at most
    test_images: PositiveInt  # likewise
    base_images: NonNegativeInt  # training images after those, to choose on; 0: glyphs instead
    glyphs: GlyphParams

    @model_validator(mode="after")
    def network_is_known(self) -> Self:
        if self.network is not None and self.network not in self.networks:
            raise ValueError(f"network: expected null or one of {', '.join(self.networks)}, got {self.network!r}")
        return self

    @property
    def chosen(self) -> NetworkParams | None:
        """The network of timm to read; None: the backbone's file is one of pretrain_backbone."""
        return None if self.network is None else self.networks[self.network]


def with_random_weights(backbone: Backbone, seed: int) -> Backbone:
    """Return a backbone of the same shape that has learned nothing."""
    torch.manual_seed(seed)
    vit = copy.deepcopy(backbone.vit)
    for module in vit.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    vit.init_weights()
    return Backbone(vit, backbone.config, "", {})


def read_networks(
    path: Path, chosen: NetworkParams | None, seed: int, device: torch.device
) -> tuple[dict[str, Backbone], dict[str, Backbone]]:
    """Return, for each layer to choose from, the network, and one of its kind that has learned nothing."""
    if chosen is None:
        backbone = load_backbone(path, device)
        return {"-1": backbone}, {"-1": with_random_weights(backbone, seed)}
    config, sha256 = chosen.config(), fingerprint(path)
    network = build_network(config.name)
    for layer in chosen.layers:
        check_layer(network, layer, config.name)
    load_published(network, path, config.name)
    torch.manual_seed(seed)
    random = build_network(config.name)
    for each in (network, random):
        fit_size(each, config)
        each.to(device, memory_format=torch.channels_last)
    return (
        {str(layer): Network(network, config, sha256, {}, layer) for layer in chosen.layers},
        {str(layer): Network(random, config, "", {}, layer) for layer in chosen.layers},
    )


def draw_glyphs(params: GlyphParams, size: int, seed: int) -> tuple[UInt8[Tensor, "g 1 h w"], Int[Tensor, " g"]]:
    """Return drawings of unseen classes, and their labels."""
    labels = torch.arange(params.images) % params.classes
    glyphs, random = Glyphs(params.first_class + params.classes, seed), generator(seed, "glyph features")
    return torch.cat([glyphs.draw(params.first_class + y, size, random) for y in labels.split(DRAWN_AT_ONCE)]), labels


def images_after(train: ImageSet, first: int, count: int) -> tuple[UInt8[Tensor, "g c h w"], Int[Tensor, " g"]]:
    """Return the images that choices are made on, `count` after the first, and their labels; InputError if there are too few."""
    if first + count > len(train):
        raise InputError(f"extract_features.base_images: {count} after the first {first}, there are {len(train)}")
    return train.images[first : first + count], train.labels[first : first + count]


def extract(
    jobs: dict[str, tuple[Backbone, UInt8[Tensor, "n c h w"]]], work: Path, device: torch.device, progress: str
) -> dict[str, Float[Tensor, "n k d"]]:
    """Return the features of each job's images; pieces of them that lie in `work` are not computed again."""
    pieces = {
        work / f"{name}-{i:04d}.safetensors": (backbone, part)
        for name, (backbone, images) in jobs.items()
        for i, part in enumerate(images.split(PIECE))
    }
    compute_pieces(lambda piece: {"x": piece[0].features(piece[1]).cpu().numpy()}, pieces, device, progress)

    def joined(name: str, count: int) -> Tensor:
        parts = range(-(-count // PIECE))
        return torch.cat([load_file(work / f"{name}-{i:04d}.safetensors")["x"] for i in parts])

    return {name: joined(name, len(images)) for name, (_, images) in jobs.items()}


def layer_accuracies(
    features: dict[str, Float[Tensor, "n k d"]], labels: Int[Tensor, " n"], params: EpisodeParams, seed: int
) -> dict[str, float]:
    """Return the mean accuracy of linear probes of each layer in the same episodes among base images."""
    seeds = range(seed, seed + params.episodes)
    episodes = [draw_episode(labels, labels, params.n_way, params.n_shot, params.queries, s) for s in seeds]

    def acc(x: Float[Tensor, "n d"], e: Episode) -> float:
        logits = linear_probe(x[e.support], e.support_labels, x[e.queries], params.n_way, params.decay)
        return accuracy(logits, e.query_labels).item()

    return {layer: sum(acc(x[:, 0], e) for e in episodes) / len(episodes) for layer, x in features.items()}


def save_copy(path: Path, source: Path, network: Backbone) -> None:
    """Leave what later stages train through, of a network that they cannot train through its config alone."""
    if not isinstance(network, Network):
        with atomic_path(path) as copied:
            shutil.copyfile(source, copied)
    elif has_class_token(network.vit):
        save_backbone(path, network.vit, network.config, {})
    else:
        save_arrays(path, {}, {"config": asdict(network.config), "sha256": network.sha256})


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="of extract_features.datasets").dataset
    params = Params.load("extract_features", dataset)
    pin_threads()
    device = pick_device()
    path = require(params.backbone)
    candidates, untrained = read_networks(path, params.chosen, params.seed, device)
    whole, test = load_images(dataset, device)
    train, test = first(whole, params.train_images), first(test, params.test_images)
    if params.base_images:
        base, base_labels = images_after(whole, params.train_images, params.base_images)
    else:
        size = next(iter(candidates.values())).config.image_size
        base, base_labels = draw_glyphs(params.glyphs, size, params.seed)
    recipe = params.model_dump(mode="json") | {"inputs": fingerprint(path, DATA / f"{dataset}.safetensors")}
    recipe["precision"] = os.environ.get("WEIGHTLENS_PRECISION")  # pieces of one are not gone on with in another
    work = work_folder(f"extract_features/{dataset}", recipe)

    jobs = {layer: (network, base) for layer, network in candidates.items()}
    based = extract(jobs, work / "base", device, f"base features for {dataset}")
    several = based if len(based) > 1 else {}
    acc = layer_accuracies(several, base_labels, params.layer_episodes, params.seed)
    layer = max(based, key=lambda each: acc.get(each, 0.0))
    sets = {"train": train.images, "test": test.images}
    jobs = {name: (candidates[layer], images) for name, images in sets.items()}
    jobs |= {f"random_{name}": (untrained[layer], images) for name, images in sets.items()}
    arrays = {name: x.numpy() for name, x in extract(jobs, work, device, f"features of {dataset}").items()}
    arrays |= {f"{name}_labels": s.labels.cpu().numpy() for name, s in (("train", train), ("test", test))}
    arrays |= {"base": based[layer].numpy(), "base_labels": base_labels.cpu().numpy()}
    arrays["base_images"] = base.cpu().numpy()
    network = candidates[layer]
    about = {"backbone": network.config.name, "sha256": network.sha256, "is_vit": has_class_token(network.vit)}
    about |= {"image_size": network.config.image_size, "layer": layer, "base_is_new": params.base_images == 0}
    save_copy(MODELS / dataset / "backbone.safetensors", path, network)
    save_arrays(MODELS / dataset / "features.safetensors", arrays, about | {"classes": train.classes})
    save_json(REPORTS / dataset / "network.json", about | {"layer_acc": acc})
    shutil.rmtree(work, ignore_errors=True)
    print(f"{dataset}: features of {len(train)} training and {len(test)} test images, and of {len(base)} to choose on")


if __name__ == "__main__":
    run(main)
