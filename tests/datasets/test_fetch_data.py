"""Data comes in whole, checked and unchanged, or not at all with one clear line."""

import gzip
import hashlib
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from reproduction import ROOT
from safetensors.numpy import load_file

from stages.common.drawings import Shapes
from stages.common.files import load_metadata
from stages.common.randomness import generator
from stages.common.stage import InputError
from stages.datasets import fetch_data
from stages.datasets.image_folder import decode, read_image_folder


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three training images and one test image each, 8x8 colour."""
    random = np.random.default_rng(0)
    for split, n in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                (tmp_path / "photos" / split / name / f"{i}.png").write_bytes(png(pixels))
    return tmp_path / "photos"


def archive(folder: Path, *extra: tuple[tarfile.TarInfo, bytes]) -> Path:
    path = folder.parent / "photos.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for split in ("train", "test"):
            tar.add(folder / split, split)
        for member, content in extra:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def run(monkeypatch: pytest.MonkeyPatch, dataset: str) -> None:
    monkeypatch.setattr("sys.argv", ["fetch_data", "--dataset", dataset])
    fetch_data.main()


def test_digits_are_scikit_learns(project, monkeypatch):
    from sklearn.datasets import load_digits

    run(monkeypatch, "digits")
    got = load_file(project / "data/digits.safetensors")
    assert got["train_images"].shape == (1437, 1, 8, 8)
    assert got["train_images"].dtype == np.uint8
    assert got["train_labels"].dtype == np.int64
    both = np.concatenate([got["train_images"], got["test_images"]])[:, 0]
    expected = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, both)) == sorted(map(bytes, expected))
    assert set(np.bincount(got["test_labels"])) <= {35, 36, 37}
    assert load_metadata(project / "data/digits.safetensors") == {"classes": list("0123456789")}


def test_digits_need_no_torch(project):
    code = "import sys; from stages.datasets import fetch_data; fetch_data.main(); assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", code, "--dataset", "digits"]
    subprocess.run(words, cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def read_cells(images: np.ndarray) -> np.ndarray:
    """Measure what colour images show, [n, 3, s, s] -> [n]: where red and blue stand out, and how much of its square they fill."""
    colours = images[:, [0, 2]].astype(float) - 40
    half = images.shape[-1] // 2
    blue = colours[:, 1].sum((1, 2)) > colours[:, 0].sum((1, 2))
    light = np.where(blue[:, None, None], colours[:, 1], colours[:, 0])
    right = light[:, :, half:].sum((1, 2)) > light[:, :, :half].sum((1, 2))
    lit = light > 60  # half of the least bright: five standard deviations of the noise
    filled = lit.sum((1, 2)) / (lit.any(1).sum(1) * lit.any(2).sum(1))
    return (filled < 0.82) + 2 * blue + 4 * right


def test_shapes_show_their_attributes(project, monkeypatch):
    run(monkeypatch, "shapes")
    got = load_file(project / "data/shapes.safetensors")
    names = load_metadata(project / "data/shapes.safetensors")["classes"]
    assert (names[0], names[1], names[2], names[4]) == (
        "red square left",
        "red cross left",
        "blue square left",
        "red square right",
    )
    attributes = Shapes().attributes
    for cell, name in enumerate(names):
        assert [("cross" in name), ("blue" in name), ("right" in name)] == attributes[cell].tolist()
        assert attributes[cell] @ torch.tensor([1, 2, 4]) == cell
    for split in ("train", "test"):
        assert got[f"{split}_images"].shape[1:] == (3, 16, 16)
        assert (read_cells(got[f"{split}_images"]) == got[f"{split}_labels"]).mean() > 0.99
    large = torch.arange(80) % 8
    assert (read_cells(Shapes().draw(large, 32, generator(0, "test")).numpy()) == large.numpy()).mean() > 0.95


@pytest.mark.parametrize(("dataset", "classes"), [("glyphs", 10), ("shapes", 8)])
def test_drawings_are_balanced_and_the_same_for_a_seed_and_not_those_of_the_test(
    project, monkeypatch, dataset, classes
):
    path = project / f"data/{dataset}.safetensors"
    run(monkeypatch, dataset)
    first, got = path.read_bytes(), load_file(path)
    run(monkeypatch, dataset)
    assert path.read_bytes() == first
    for split in ("train", "test"):
        counts = np.bincount(got[f"{split}_labels"], minlength=classes)
        assert counts.max() - counts.min() <= 1
        assert np.unique(np.diff(got[f"{split}_labels"])).size > 3  # in random order
    train, test = (set(map(bytes, got[f"{split}_images"])) for split in ("train", "test"))
    assert len(train) == len(got["train_images"])
    assert not train & test
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["fetch_data"]["sources"][dataset]["seed"] = 1
    Path("params.yaml").write_text(yaml.safe_dump(params))
    run(monkeypatch, dataset)
    assert not train & set(map(bytes, load_file(path)["train_images"]))


def test_folder_and_archive_give_the_same_images_in_the_order_of_their_paths(folder):
    (x, y), (test_x, test_y), classes = read_image_folder(folder, None, 8, "RGB")
    assert classes == ["cat", "dog"]
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert test_y.tolist() == [0, 1]
    expected = np.asarray(Image.open(folder / "train/dog/1.png")).transpose(2, 0, 1)
    assert np.array_equal(x[4], expected)
    packed = archive(folder)
    (x2, y2), (test_x2, test_y2), _ = read_image_folder(
        packed, hashlib.sha256(packed.read_bytes()).hexdigest(), 8, "RGB"
    )
    for a, b in ((x, x2), (y, y2), (test_x, test_x2), (test_y, test_y2)):
        assert np.array_equal(a, b)


def test_photos_are_turned_upright_and_deep_ones_refused():
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left side is the top
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", exif=exif)
    upright = decode(file.getvalue(), 8, "L")[0]
    assert upright[0].min() > 200
    assert upright[-1].max() < 50
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode(png(np.full((8, 8), 300, dtype=np.uint16)), 8, "L")


def test_images_are_resized_and_turned_grey():
    grey = np.full((20, 10, 3), 77, dtype=np.uint8)
    assert np.array_equal(decode(png(grey), 4, "L"), np.full((1, 4, 4), 77))
    assert decode(png(grey), 4, "RGB").shape == (3, 4, 4)


def test_the_first_images_of_a_folder_are_of_all_its_classes(tmp_path):
    for split, n in (("train", 30), ("test", 20)):
        for value, name in enumerate(("cat", "dog", "owl")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.full((8, 8, 3), 80 * value + i, dtype=np.uint8)
                (tmp_path / "photos" / split / name / f"{i}.png").write_bytes(png(pixels))
    source = fetch_data.ImageFolder(
        kind="imagefolder", path=str(tmp_path / "photos"), sha256=None, image_size=8, mode="RGB"
    )
    splits = fetch_data.fetch_image_folder(source, None)
    again = fetch_data.fetch_image_folder(source, None)
    for (images, labels), (same, _), n in zip(splits[:2], again[:2], (30, 20), strict=True):
        assert np.array_equal(images, same)
        assert set(labels[:10]) == {0, 1, 2}
        assert np.array_equal(np.sort(images[:, 0, 0, 0]), np.sort([80 * v + i for v in range(3) for i in range(n)]))
        assert np.array_equal(images[:, 0, 0, 0] // 80, labels)


@pytest.mark.parametrize("kind", ["absolute", "parent", "symlink", "hardlink", "device"])
def test_unsafe_members_are_refused(folder, kind):
    member = tarfile.TarInfo(
        {"absolute": "/tmp/evil.png", "parent": "train/../../evil.png"}.get(kind, "train/cat/x.png")
    )
    if kind in ("symlink", "hardlink", "device"):
        member.type = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}[kind]
        member.linkname = "/etc/passwd"
    with pytest.raises(InputError, match=f"{member.name}: links, devices and paths that leave"):
        read_image_folder(archive(folder, (member, b"")), None, 8, "RGB")
    assert not Path("/tmp/evil.png").exists()


def test_images_that_do_not_decode_are_all_named(folder):
    (folder / "train/cat/bad1.png").write_bytes(b"no image")
    whole = (folder / "train/dog/0.png").read_bytes()
    (folder / "test/dog/bad2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError) as error:
        read_image_folder(folder, None, 8, "RGB")
    assert "2 images do not decode" in str(error.value)
    assert "test/dog/bad2.png" in str(error.value)
    assert "train/cat/bad1.png" in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_archives_are_refused(folder):
    path = archive(folder)
    whole = path.read_bytes()
    sha256 = hashlib.sha256(whole).hexdigest()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="sha256 expected"):
            read_image_folder(path, sha256, 8, "RGB")
        with pytest.raises(InputError):
            read_image_folder(path, None, 8, "RGB")


def test_a_wrong_layout_is_refused(folder):
    for split in ("test", "train"):
        (folder / split / "bird").mkdir()
        (folder / split / "bird/0.png").write_bytes((folder / "test/cat/0.png").read_bytes())
        with pytest.raises(InputError, match="only in train/ or only in test/: bird"):
            read_image_folder(folder, None, 8, "RGB")
        (folder / split / "bird/0.png").unlink()
    (folder / "train/cat/deeper").mkdir()
    (folder / "train/cat/deeper/0.png").write_bytes(b"")
    with pytest.raises(InputError, match="expected train/<class>/<image>"):
        read_image_folder(folder, None, 8, "RGB")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=r"there is no train/ \(there: nothing\)"):
        read_image_folder(folder / "empty", None, 8, "RGB")
    shutil.rmtree(folder / "train/cat/deeper")
    (folder / "test").rename(folder / "tests")
    with pytest.raises(InputError, match=r"there is no test/ \(nor val/, .*\) \(there: tests, train\)"):
        read_image_folder(folder, None, 8, "RGB")


def equal(first, second) -> bool:
    """Whether two readings of images are the same."""
    return first[2] == second[2] and all(
        np.array_equal(a, b) for i in (0, 1) for a, b in zip(first[i], second[i], strict=True)
    )


def test_images_may_lie_in_a_zip_below_one_folder_and_be_tested_on_val(folder):
    expected = read_image_folder(folder, None, 8, "RGB")
    zipped = Path(shutil.make_archive(str(folder.parent / "zipped"), "zip", folder))
    assert equal(read_image_folder(zipped, None, 8, "RGB"), expected)
    for name in ("val", "valid", "validation"):
        (folder / next(path.name for path in folder.iterdir() if path.name != "train")).rename(folder / name)
        assert equal(read_image_folder(folder, None, 8, "RGB"), expected)
    for kind in ("zip", "gztar"):
        below = Path(shutil.make_archive(str(folder.parent / "below"), kind, folder.parent, folder.name))
        assert equal(read_image_folder(below, None, 8, "RGB"), expected)


def test_a_test_set_comes_before_a_validation_set_which_is_not_read(folder):
    expected = read_image_folder(folder, None, 8, "RGB")
    shutil.copytree(folder / "train", folder / "val")
    (folder / "val/cat/0.png").write_bytes(b"no image")
    assert equal(read_image_folder(folder, None, 8, "RGB"), expected)


def test_what_leaves_a_zip_is_refused(tmp_path):
    path = tmp_path / "bad.zip"
    for name, mode in (("../train/cat/0.png", 0o100644), ("train/cat/link.png", 0o120777)):
        with zipfile.ZipFile(path, "w") as pack:
            item = zipfile.ZipInfo(name)
            item.external_attr = mode << 16
            pack.writestr(item, b"x")
        with pytest.raises(InputError, match="links, devices and paths that leave the archive are refused"):
            read_image_folder(path, None, 8, "RGB")


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST's files."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mirror(tmp_path: Path) -> dict[str, np.ndarray]:
    """A mirror that holds a data set in MNIST's format."""
    random = np.random.default_rng(0)
    arrays = {}
    for prefix, n in (("train", 20), ("t10k", 10)):
        arrays[f"{prefix}-images-idx3-ubyte"] = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = random.integers(0, 10, n, dtype=np.uint8)
    raw = tmp_path / "mirror" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in arrays.items():
        (raw / name).write_bytes(idx(array))
    return arrays


def test_the_mirror_is_read_as_torchvision_lays_it_out(project, mirror, monkeypatch):
    monkeypatch.setenv("WEIGHTLENS_MIRROR", str(project / "mirror"))
    run(monkeypatch, "fashion_mnist")
    got = load_file(project / "data/fashion_mnist.safetensors")
    assert np.array_equal(got["train_images"][:, 0], mirror["train-images-idx3-ubyte"])
    assert np.array_equal(got["test_labels"], mirror["t10k-labels-idx1-ubyte"])


@pytest.mark.parametrize("packed", [4, 2], ids=["all packed", "some packed"])
def test_the_mirror_may_hold_the_files_as_they_are_downloaded(project, mirror, monkeypatch, packed):
    monkeypatch.setenv("WEIGHTLENS_MIRROR", str(project / "mirror"))
    run(monkeypatch, "fashion_mnist")
    expected = (project / "data/fashion_mnist.safetensors").read_bytes()
    raw = project / "mirror/FashionMNIST/raw"
    for name in list(mirror)[:packed]:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    before = sorted(raw.iterdir())
    run(monkeypatch, "fashion_mnist")
    assert (project / "data/fashion_mnist.safetensors").read_bytes() == expected
    assert sorted(raw.iterdir()) == before  # a mirror is only read


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw[:40] + b"damage" + raw[46:]])
def test_damaged_packed_files_are_named(project, mirror, monkeypatch, damage):
    monkeypatch.setenv("WEIGHTLENS_MIRROR", str(project / "mirror"))
    raw = project / "mirror/FashionMNIST/raw"
    for name in mirror:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes()))
        (raw / name).unlink()
    path = raw / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"FashionMNIST in .* is damaged or incomplete") as error:
        run(monkeypatch, "fashion_mnist")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("mirror")
def test_a_damaged_mirror_is_named_not_bypassed(project, monkeypatch):
    monkeypatch.setenv("WEIGHTLENS_MIRROR", str(project / "mirror"))
    raw = project / "mirror/FashionMNIST/raw"
    shutil.copytree(raw, project / "mirror/MNIST/raw")
    with pytest.raises(InputError, match=r"MNIST in .* is damaged or incomplete: train-images-idx3-ubyte: sha256"):
        run(monkeypatch, "mnist")
    (raw / "train-images-idx3-ubyte").write_bytes((raw / "train-images-idx3-ubyte").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"FashionMNIST in .* is damaged or incomplete"):
        run(monkeypatch, "fashion_mnist")
    (project / "mirror/cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match=r"CIFAR10 in .* is damaged or incomplete"):
        run(monkeypatch, "cifar10")
    assert not (project / "data").exists()


def test_a_failed_download_leaves_nothing_and_says_what_to_do(project, monkeypatch):
    from torchvision.datasets import mnist

    def interrupted(_url, download_root, filename, **_):
        Path(download_root, filename).write_bytes(b"half a file")
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(mnist, "download_and_extract_archive", interrupted)
    with pytest.raises(InputError, match=r"MNIST could not be downloaded .*WEIGHTLENS_MIRROR"):
        run(monkeypatch, "mnist")
    assert not (project / "data").exists()
    assert not [path for path in project.rglob("*") if path.is_file() and path.name != "params.yaml"]


@pytest.mark.usefixtures("project")
def test_mistakes_in_params_and_environment_are_named(monkeypatch):
    with pytest.raises(InputError, match=r"params.yaml: fetch_data.sources.nonsense is missing \(there: cifar10,"):
        run(monkeypatch, "nonsense")
    monkeypatch.setenv("WEIGHTLENS_MIRROR", "/no/such/folder")
    with pytest.raises(InputError, match="WEIGHTLENS_MIRROR=/no/such/folder is not a folder"):
        run(monkeypatch, "mnist")
    monkeypatch.delenv("WEIGHTLENS_MIRROR")
    with pytest.raises(InputError, match=r"no folder or archive at cifar10-jpeg.tar.gz"):
        run(monkeypatch, "cifar10_jpeg")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["fetch_data"]["sources"]["digits"] = {"kind": "digit"}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(
        InputError, match="kind: expected digits, glyphs, shapes, torchvision, imagefolder, got 'digit'"
    ):
        run(monkeypatch, "digits")
