"""A masked autoencoder small enough to fine-tune in milliseconds, and images for it."""

from pathlib import Path

import torch

from stages.common.backbone import BackboneConfig, build_vit, save_backbone
from stages.common.files import save_arrays
from stages.common.images import ImageSet
from stages.common.mae import MaskedAutoencoder
from stages.recall.functional_vit import Base
from stages.recall.objective import random_head

CLASSES, SIDE = 8, 16
SHAPE = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
CONFIG = BackboneConfig("vit_tiny_patch16_224", False, SIDE, SHAPE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_set(n: int, seed: int) -> ImageSet:
    """Noisy copies of a pattern for each class, in no order."""
    labels = torch.arange(n)[torch.randperm(n, generator=seeded(seed))] % CLASSES
    patterns = torch.rand(CLASSES, 1, SIDE, SIDE, generator=seeded())[labels]
    noise = torch.rand(patterns.shape, generator=seeded(seed + 1))
    return ImageSet((255 * (0.6 * patterns + 0.4 * noise)).byte(), labels, [f"c{c}" for c in range(CLASSES)])


TRAIN, TEST = image_set(301, 1), image_set(90, 5)


def autoencoder(spread=0.1) -> MaskedAutoencoder:
    """A masked autoencoder of which no weight is what it is at first."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = MaskedAutoencoder(build_vit(CONFIG)).eval()
        for p in model.parameters():
            p += spread * torch.randn_like(p)
    return model


def base_of(model: MaskedAutoencoder) -> Base:
    """What fine-tunes descend from: its decoder and a head."""
    encoder = model.vit.state_dict()
    decoder = {k: v for k, v in model.state_dict().items() if not k.startswith("vit.")}
    base = Base(encoder, decoder, SHAPE["num_heads"], SHAPE["patch_size"], SIDE, CONFIG.mean, CONFIG.std)
    head = random_head(CLASSES, base, seeded(3))
    return Base(encoder, decoder | head, base.heads, base.patch_size, SIDE, CONFIG.mean, CONFIG.std)


def save_inputs(*stages: str) -> None:
    """Write the images as the data set `tiny`, and the same base, an autoencoder and a classifier in one, as each stage's."""
    arrays = {
        f"{name}_{kind}": getattr(part, kind).numpy()
        for name, part in (("train", TRAIN), ("test", TEST))
        for kind in ("images", "labels")
    }
    save_arrays(Path("data/tiny.safetensors"), arrays, {"classes": TRAIN.classes})
    model = autoencoder()
    for stage in stages:
        save_backbone(Path(f"models/{stage}/tiny/backbone.safetensors"), model.vit, CONFIG, base_of(model).decoder)
