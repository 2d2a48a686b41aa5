"""Read labelled images from a folder or a tar archive without unpacking it, so nothing can escape or be left behind."""

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from stages.common.stage import InputError, one_line

MAX_IMAGE_BYTES = 1 << 28  # of one image file; a larger one is no photograph
SHOWN = 5  # how many bad images an error names


def read_image_folder(
    path: Path, sha256: str | None, size: int, mode: str
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], list[str]]:
    """Return ((train images, labels), (test images, labels), class names) of `train/<class>/*` and `test/<class>/*` in `path`.

    Images are uint8 [n, 1 or 3, size, size], in the order of their paths; labels index the sorted class names of `train`.
    InputError: the checksum or the layout is wrong, a member is unsafe, or images do not decode.
    """
    if sha256 is not None:
        check_sha256(path, sha256)
    files = archive_files(path) if path.is_file() else folder_files(path)
    images: dict[str, dict[str, list[tuple[str, np.ndarray]]]] = {"train": {}, "test": {}}
    bad: list[str] = []
    for name, content in tqdm(files, desc=f"decode {path.name}", unit=" images", disable=None):
        parts = PurePosixPath(name).parts
        if len(parts) != 3 or parts[0] not in images:
            raise InputError(f"{path}: {name}: expected train/<class>/<image> or test/<class>/<image>")
        try:
            images[parts[0]].setdefault(parts[1], []).append((name, decode(content, size, mode)))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{name} ({one_line(error)[:80]})")
    if bad:
        raise InputError(
            f"{path}: {len(bad)} images do not decode: {', '.join(sorted(bad)[:SHOWN])}{', ...' if len(bad) > SHOWN else ''}"
        )
    classes = sorted(images["train"])
    if not classes or not images["test"]:
        raise InputError(f"{path}: no images in train/<class>/ or none in test/<class>/")
    if odd := sorted(set(images["test"]) ^ set(classes)):
        raise InputError(f"{path}: classes that are only in train/ or only in test/: {', '.join(odd)}")
    return _stack(images["train"], classes), _stack(images["test"], classes), classes


def folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path relative to `folder`, content) of every file below train/ and test/, hidden ones left out."""
    for split in ("train", "test"):
        for top, folders, names in os.walk(folder / split, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                file = Path(top, name)
                yield file.relative_to(folder).as_posix(), file.read_bytes()


def archive_files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every file in a tar archive; InputError on a damaged archive, a link, a device or a path that leaves it."""
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise InputError(
                        f"{archive}: {member.name}: links, devices and paths that leave the archive are refused"
                    )
                if member.isdir() or any(part.startswith(".") for part in name.parts):
                    continue
                if member.size > MAX_IMAGE_BYTES:
                    raise InputError(f"{archive}: {member.name}: {member.size} bytes are too many for an image")
                yield name.as_posix(), tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{archive} is damaged or no tar archive ({one_line(error)}): get it again") from None


def decode(content: bytes, size: int, mode: str) -> np.ndarray:
    """Return an encoded image as uint8 [1 or 3, size, size]: upright, resized (bilinear, antialiased) if it has another size.

    ValueError if it has more than 8 bits a channel, which would be cut to white.
    """
    with Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixel format {image.mode} has more than 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert(mode)
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def check_sha256(archive: Path, expected: str) -> None:
    """InputError unless the file's SHA-256 is `expected`."""
    if not archive.is_file():
        raise InputError(f"{archive} is a folder: sha256 is for archives, set it to null")
    with archive.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise InputError(
            f"{archive} is damaged or another version: sha256 expected {expected}, got {got}; get it again"
        )


def _stack(by_class: dict[str, list[tuple[str, np.ndarray]]], classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of all classes, [n, c, h, w] in the order of class and path, and their labels [n]."""
    images = [image for name in classes for _, image in sorted(by_class.get(name, []), key=lambda item: item[0])]
    labels = [label for label, name in enumerate(classes) for _ in by_class.get(name, [])]
    return np.stack(images), np.array(labels, dtype=np.int64)
