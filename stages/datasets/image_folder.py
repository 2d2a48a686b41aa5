"""Read labelled images from a folder, or from a tar or zip archive without unpacking it, so nothing can escape or be left behind.

They lie in train/<class>/ and test/<class>/; val, valid or validation may stand for a test that is not there, and one folder may
hold it all, as archives often do.
"""

import hashlib
import io
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from stages.common.stage import InputError, one_line

MAX_IMAGE_BYTES = 1 << 28  # of one image file; a larger one is no photograph
SHOWN = 5  # how many bad images an error names
TESTS = ("test", "val", "valid", "validation")  # folders of images to test on, the first that is there
LAYOUT = "expected train/<class>/<image> and test/<class>/<image>"


def read_image_folder(
    path: Path, sha256: str | None, size: int, mode: str
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], list[str]]:
    """Return ((train images, labels), (test images, labels), class names) of `train/<class>/*` and `test/<class>/*` in `path`.

    Images are uint8 [n, 1 or 3, size, size], in the order of their paths; labels index the sorted class names of `train`.
    InputError: the checksum or the layout is wrong, a member is unsafe, or images do not decode.
    """
    if sha256 is not None:
        check_sha256(path, sha256)
    archive = path.is_file()
    names = [name for name in (archive_names(path) if archive else folder_names(path)) if not hidden(name)]
    top, test = find_layout(path, names)
    places = {f"{top}train": "train", f"{top}{test}": "test"}
    images: dict[str, dict[str, list[tuple[str, np.ndarray]]]] = {"train": {}, "test": {}}
    bad: list[str] = []
    wanted = {name for name in names if name.startswith(tuple(f"{place}/" for place in places))}
    files = archive_files(path, wanted) if archive else ((name, (path / name).read_bytes()) for name in sorted(wanted))
    for name, content in tqdm(files, f"decode {path.name}", len(wanted), unit=" images", disable=None):
        parts = PurePosixPath(name.removeprefix(top)).parts
        if len(parts) != 3:
            raise InputError(f"{path}: {name}: {LAYOUT}")
        split = places[f"{top}{parts[0]}"]
        try:
            images[split].setdefault(parts[1], []).append((name, decode(content, size, mode)))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{name} ({one_line(error)[:80]})")
    if bad:
        raise InputError(
            f"{path}: {len(bad)} images do not decode: {', '.join(sorted(bad)[:SHOWN])}{', ...' if len(bad) > SHOWN else ''}"
        )
    classes = sorted(images["train"])
    if odd := sorted(set(images["test"]) ^ set(classes)):
        raise InputError(f"{path}: classes that are only in train/ or only in test/: {', '.join(odd)}")
    return _stack(images["train"], classes), _stack(images["test"], classes), classes


def hidden(name: str) -> bool:
    """Whether a file or a folder above it is hidden, or left by an archiver."""
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def find_layout(path: Path, names: list[str]) -> tuple[str, str]:
    """Return the one folder that holds it all (with a slash, or nothing), and the folder of images to test on.

    InputError says what is missing, and what is there.
    """
    tops = {PurePosixPath(name).parts[0] for name in names}
    top = f"{tops.pop()}/" if len(tops) == 1 and not tops & {"train", *TESTS} else ""
    inside = {PurePosixPath(name.removeprefix(top)).parts[0] for name in names}
    test = next((name for name in TESTS if name in inside), None)
    if "train" not in inside or test is None:
        missing = "train/" if "train" not in inside else f"test/ (nor {', '.join(f'{name}/' for name in TESTS[1:])})"
        there = ", ".join(sorted(inside)[:SHOWN]) or "nothing"
        raise InputError(f"{path}: {LAYOUT}; there is no {missing} (there: {there})")
    return top, test


def folder_names(folder: Path) -> Iterator[str]:
    """Yield the path, relative to `folder`, of every file below it."""
    for top, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(top, name).relative_to(folder).as_posix() for name in sorted(names))


def check_member(archive: Path, name: str, regular: bool, size: int) -> None:
    """InputError if a member of an archive could escape from it, is no file, or is too large for an image."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not regular:
        raise InputError(f"{archive}: {name}: links, devices and paths that leave the archive are refused")
    if size > MAX_IMAGE_BYTES:
        raise InputError(f"{archive}: {name}: {size} bytes are too many for an image")


def archive_members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield the path of every file in a tar or zip archive, in its order, and how to read it before the next one is asked for."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as pack:
                for item in pack.infolist():
                    kind = (
                        item.external_attr >> 28
                    )  # of Unix: 0 where another system packed it, 8 of a file, 4 of a folder
                    check_member(archive, item.filename, kind in (0, 4, 8), item.file_size)
                    if not item.is_dir():
                        yield item.filename, partial(pack.read, item)
            return
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                check_member(archive, member.name, member.isfile() or member.isdir(), member.size)
                if member.isfile():
                    yield PurePosixPath(member.name).as_posix(), partial(_read_member, tar, member)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        OSError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise InputError(f"{archive} is damaged or no tar or zip archive ({one_line(error)}): get it again") from None


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # of files there is one
    return file.read()


def archive_names(archive: Path) -> Iterator[str]:
    """Yield the path of every file in an archive; InputError on a damaged archive, a link, a device or a path that leaves it."""
    return (name for name, _ in archive_members(archive))


def archive_files(archive: Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the files of an archive that are wanted."""
    return ((name, read()) for name, read in archive_members(archive) if name in wanted)


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
