"""Fetch one image data set, or draw it, and keep it as one file of tensors.

Sources (params.yaml: fetch_data.sources.<dataset>): scikit-learn's bundled digits, glyphs and shapes that are drawn here,
torchvision's MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 (downloaded and checked), or a folder or tar archive of images. A
folder named by WEIGHTLENS_MIRROR is looked in first; it is laid out as torchvision lays out its root (MNIST/raw/...), with MNIST's
and Fashion-MNIST's files as they are downloaded (.gz), unpacked, or both.

Writes  data/<dataset>.safetensors: uint8 train_images [n, c, h, w], int64 train_labels [n], test_images, test_labels;
        metadata {"classes": [name of label 0, name of label 1, ...]}
"""

import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from stages.common.files import save_arrays
from stages.common.stage import InputError, StageParams, lookup, one_line, parse_arguments, run
from stages.datasets.image_folder import read_image_folder

if TYPE_CHECKING:  # it takes torch two seconds to load, which most data sets do not need
    from stages.common.drawings import Glyphs, Shapes

DATA = Path("data")
DOWNLOADS = Path(".work/fetch_data")
SECTION = "fetch_data.sources"
DRAWN_AT_ONCE = 500  # images: more leave the processor's cache

MNIST_SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

Split = tuple[np.ndarray, np.ndarray]  # uint8 images [n, c, h, w], int64 labels [n]
Dataset = tuple[Split, Split, list[str]]  # train, test, class names


class Digits(StageParams):
    """scikit-learn's 1,797 digits of 8x8 pixels, split at random with equal class shares."""

    kind: Literal["digits"]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    seed: NonNegativeInt


class DrawnGlyphs(StageParams):
    """Glyphs of Bézier strokes, grey, each class as often as any other."""

    kind: Literal["glyphs"]
    classes: PositiveInt
    image_size: PositiveInt  # pixels
    train_images: PositiveInt
    test_images: PositiveInt
    seed: NonNegativeInt


class DrawnShapes(StageParams):
    """Colour images of one object with three binary attributes, each of their eight combinations as often as any other."""

    kind: Literal["shapes"]
    image_size: Annotated[int, Field(ge=16)]  # pixels
    train_images: PositiveInt
    test_images: PositiveInt
    seed: NonNegativeInt


class Torchvision(StageParams):
    """One of torchvision's data sets, with its own train and test split."""

    kind: Literal["torchvision"]
    name: Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"]


class ImageFolder(StageParams):
    """A folder or tar archive with train/<class>/* and test/<class>/*."""

    kind: Literal["imagefolder"]
    path: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None  # of the archive; null: not checked
    image_size: PositiveInt  # pixels, height and width after resizing
    mode: Literal["L", "RGB"]  # grey or colour


Source = Digits | DrawnGlyphs | DrawnShapes | Torchvision | ImageFolder


def load_source(dataset: str) -> Source:
    """Read where `dataset` comes from."""
    where = f"{SECTION}.{dataset}"
    values = lookup(where)
    kinds: dict[str, type[Source]] = {
        "digits": Digits,
        "glyphs": DrawnGlyphs,
        "shapes": DrawnShapes,
        "torchvision": Torchvision,
        "imagefolder": ImageFolder,
    }
    if values.get("kind") not in kinds:
        raise InputError(f"params.yaml: {where}.kind: expected {', '.join(kinds)}, got {values.get('kind')!r}")
    return kinds[values["kind"]].parse(values, lambda path: ".".join([where, *path]))


def fetch_digits(source: Digits) -> Dataset:
    """Return the digits; scikit-learn's pixels of 0 to 16 become 0 to 255."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=source.test_fraction, random_state=source.seed, stratify=labels
    )
    return (images[train], labels[train]), (images[test], labels[test]), [str(name) for name in digits.target_names]


def draw_glyphs(source: DrawnGlyphs) -> Dataset:
    """Return drawn glyphs; class c is the same for every number of classes and images."""
    from stages.common.drawings import Glyphs

    train, test = draw_splits(Glyphs(source.classes, source.seed), source.classes, source)
    return train, test, [str(c) for c in range(source.classes)]


def draw_shapes(source: DrawnShapes) -> Dataset:
    """Return drawn shapes, labelled by their cell."""
    from stages.common.drawings import Shapes

    shapes = Shapes()
    train, test = draw_splits(shapes, len(shapes.names), source)
    return train, test, shapes.names


def draw_splits(drawing: "Glyphs | Shapes", classes: int, source: DrawnGlyphs | DrawnShapes) -> list[Split]:
    """Return training and test images of labels in equal shares and random order, each from a generator of its own."""
    import torch

    from stages.common.randomness import generator
    from stages.common.runtime import pin_threads

    pin_threads()
    splits = []
    for name, n in (("train", source.train_images), ("test", source.test_images)):
        random = generator(source.seed, f"{source.kind} {name}")
        labels = torch.randperm(n, generator=random) % classes
        images = [drawing.draw(part, source.image_size, random) for part in labels.split(DRAWN_AT_ONCE)]
        splits.append((torch.cat(images).numpy(), labels.numpy()))
    return splits


def fetch_torchvision(source: Torchvision, mirror: Path | None) -> Dataset:
    """Return a torchvision data set from the mirror, or download it; nothing of a failed download is kept."""
    from torchvision import datasets

    dataset = getattr(datasets, source.name)

    def splits(root: Path, download: bool) -> Dataset:
        train, test = (dataset(root, train=train, download=download) for train in (True, False))
        return _as_split(train.data, train.targets), _as_split(test.data, test.targets), list(train.classes)

    if mirror is not None:
        place = mirror / getattr(dataset, "base_folder", f"{source.name}/raw")
        if place.is_dir():  # there: if it is damaged, say so rather than quietly download another copy
            try:
                with unpacked(mirror, place) as root:
                    check_mirrored_mnist(root / place.relative_to(mirror))
                    return splits(root, download=False)
            except (RuntimeError, ValueError, AssertionError, EOFError, OSError, zlib.error) as error:
                raise InputError(f"{source.name} in {place} is damaged or incomplete: {one_line(error)}") from None
        print(f"{source.name} is not in WEIGHTLENS_MIRROR={mirror}: downloading it")
    folder = DOWNLOADS / source.name
    shutil.rmtree(folder, ignore_errors=True)  # what a killed download left
    try:
        return splits(folder, download=True)
    except (RuntimeError, ValueError, AssertionError, EOFError, OSError) as error:
        raise InputError(
            f"{source.name} could not be downloaded ({one_line(error)}): check the network and repeat, "
            "or name a folder that holds it by WEIGHTLENS_MIRROR"
        ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def unpacked(mirror: Path, place: Path) -> Iterator[Path]:
    """Give the mirror, or, if `place` in it has MNIST's files only as they are downloaded (.gz), a copy of the mirror with them unpacked.

    The copy is deleted afterwards; the mirror may be read-only.
    """
    if all((place / name).exists() for name in MNIST_SHA256) or not any(place.glob("*-ubyte.gz")):
        yield mirror
        return
    with TemporaryDirectory() as root:
        copy = Path(root) / place.relative_to(mirror)
        copy.mkdir(parents=True)
        for name in MNIST_SHA256:
            plain = place / name
            with (
                plain.open("rb") if plain.exists() else gzip.open(f"{plain}.gz") as packed,
                (copy / name).open("wb") as file,
            ):
                shutil.copyfileobj(packed, file)
        yield Path(root)


def check_mirrored_mnist(folder: Path) -> None:
    """ValueError if a file of MNIST is not the original; torchvision checks the files it downloads, and CIFAR's, but not these."""
    if folder.parts[-2:] != ("MNIST", "raw"):
        return
    for name, expected in MNIST_SHA256.items():
        with (folder / name).open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != expected:
            raise ValueError(f"{name}: sha256 expected {expected}, got {got}")


def _as_split(images: object, labels: object) -> Split:
    """Bring torchvision's images, [n, h, w] or [n, h, w, c], to [n, c, h, w]."""
    images = np.asarray(images)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)


def find_mirror() -> Path | None:
    """Return the folder of WEIGHTLENS_MIRROR; InputError if it is set to something else."""
    name = os.environ.get("WEIGHTLENS_MIRROR")
    if not name:
        return None
    if not Path(name).is_dir():
        raise InputError(f"WEIGHTLENS_MIRROR={name} is not a folder: correct it, or unset it to download")
    return Path(name)


def fetch_image_folder(source: ImageFolder, mirror: Path | None) -> Dataset:
    """Return the images below `source.path`, looked for in the mirror first, in one fixed random order.

    A folder holds one class after the other: mixed, the first images of a set are a sample of it.
    """
    places = [folder / source.path for folder in (mirror, Path()) if folder is not None]
    for place in places:
        if place.exists():
            train, test, classes = read_image_folder(place, source.sha256, source.image_size, source.mode)
            return mixed(train), mixed(test), classes
    raise InputError(
        f"no folder or archive at {' or '.join(map(str, places))}: correct {SECTION}.*.path, or set WEIGHTLENS_MIRROR"
    )


def mixed(split: Split) -> Split:
    """Return images and labels in a random order that is always the same."""
    images, labels = split
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order]


def main() -> None:
    dataset = parse_arguments(__doc__, dataset="a data set of fetch_data.datasets").dataset
    mirror = find_mirror()
    match load_source(dataset):
        case Digits() as source:
            fetched = fetch_digits(source)
        case DrawnGlyphs() as source:
            fetched = draw_glyphs(source)
        case DrawnShapes() as source:
            fetched = draw_shapes(source)
        case Torchvision() as source:
            fetched = fetch_torchvision(source, mirror)
        case ImageFolder() as source:
            fetched = fetch_image_folder(source, mirror)
    (train_images, train_labels), (test_images, test_labels), classes = fetched
    arrays = {
        "train_images": train_images,
        "train_labels": train_labels,
        "test_images": test_images,
        "test_labels": test_labels,
    }
    save_arrays(DATA / f"{dataset}.safetensors", arrays, {"classes": classes})
    shape = " x ".join(map(str, train_images.shape[1:]))
    print(
        f"{dataset}: {len(train_images)} training and {len(test_images)} test images, {shape}, {len(classes)} classes"
    )


if __name__ == "__main__":
    run(main)
