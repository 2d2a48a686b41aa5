"""Files that others wrote: what they are, told by their content and not by their name, and what they hold. None of their code is run.

Whatever cannot be read is an InputError of one line, with the cause and the remedy.
"""

import codecs
import io
import json
import pickletools
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from stages.common.files import remedy, require
from stages.common.stage import InputError

ALLOWANCE = 2 * 1024**3  # bytes that a file's contents may take beyond its own size
TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how torch's files began before they were zip archives
ZIP = b"PK\x03\x04"
AGAIN = "download or save it again"
SAVE = "save model.state_dict() with torch.save"

OTHERS = {  # how other files begin: what they are, and what to do
    b"version https://git-lfs": "is a pointer of Git LFS, not the weights: run 'git lfs pull' in its clone",
    b"\x93NUMPY": "is an array of numpy without a name: save named arrays as .safetensors",
    b"\x89HDF": "is HDF5 (Keras): convert it to .safetensors",
    b"GGUF": "is GGUF, whose weights are quantised: take the .safetensors that it was made of",
    b"PK\x05\x06": "is a zip archive of nothing: download or save it again",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
    b"BZh": "is compressed (bzip2): unpack it first",
    b"\xfd7zXZ": "is compressed (xz): unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd): unpack it first",
    b"7z\xbc\xaf": "is an archive (7z): unpack it first",
    b"Rar!": "is an archive (rar): unpack it first",
}
CODE = {  # what a pickle calls only to do harm
    *("os", "posix", "nt", "sys", "subprocess", "pty", "importlib", "runpy"),
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "builtins.open"),
}
GROWING = {
    "hex",
    "hex_codec",
    "base64",
    "base_64",
    "base64_codec",
    "quopri",
    "quopri_codec",
    "quoted_printable",
    "uu",
    "uu_codec",
}
OWN = re.compile(
    r"torch\.\w+|torch\.(_utils|_tensor|serialization|storage|sparse|cuda|nn\.parameter)\.\w+|collections\.\w+|_codecs\.\w+"
)
DICTIONARY = re.compile(r"(dict|Dict|CfgNode|Box|Bunch)$")  # classes that are filled as dictionaries are


def shown(text: object) -> str:
    """Return a name from a file as a message may show it: without control characters, and of bearable length."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return clean if len(clean) <= 200 else f"{clean[:100]}...{clean[-50:]}"


def listed(names: Iterable[object], most: int = 4) -> str:
    """Return names as words, and how many there are beyond `most`."""
    first = [shown(name) for name in names]
    more = f" and {len(first) - most} more" if len(first) > most else ""
    return ", ".join(first[:most]) + more


def damaged(path: Path, why: str) -> InputError:
    """Return the error of a file that is broken."""
    return InputError(f"{shown(path)} is damaged ({why}){remedy(path, '-f ') or f': {AGAIN}'}")


def read_file(path: Path, map_location: str | torch.device = "cpu", shells: bool = True) -> Any:
    """Return what a file of torch's, or of safetensors, holds. Objects of classes are empty shells (`Shell`), or refused.

    InputError if it is missing, damaged, or something else.
    """
    head = read_start(path)
    with path.open("rb") as file:
        if head.startswith(ZIP):
            return _read_zip(path, file, map_location, shells)
        if head.startswith(TORCH):
            return _unpickle(path, file, _legacy_classes(path, file), map_location, shells)
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1e8:
        return _read_safetensors(path)
    raise InputError(f"{shown(path)} {_what_else(path, head)}")


def read_start(path: Path) -> bytes:
    """Return a file's first bytes; InputError if it is missing or may not be read."""
    try:
        with require(path).open("rb") as file:
            return file.read(512)
    except PermissionError:
        raise InputError(f"{shown(path)} may not be read: change its permissions") from None


def _what_else(path: Path, head: bytes) -> str:
    """Return what a file is that is none of torch's and none of safetensors, and what to do."""
    if not head:
        return f"is empty (0 bytes): {AGAIN}"
    for start, text in OTHERS.items():
        if head.startswith(start):
            return text
    name = shown(path.name)
    if name.lower().endswith(".onnx"):
        return "is ONNX, without names of a network's tensors: take the file of weights that it was exported from"
    if head[257:262] == b"ustar":
        return "is a tar archive: unpack it first"
    if re.match(rb"\s*<(!doctype|html|\?xml|head)", head, re.IGNORECASE):
        return "is a web page, not weights: download the file itself (on Hugging Face by /resolve/ in place of /blob/)"
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        return (
            "is a plain pickle, which may run code: where you trust it, write it anew by "
            f"torch.save(pickle.load(open('{name}', 'rb')), 'weights.pt')"
        )
    if not head.strip(b"\0"):
        return f"holds zeros, as a download that broke off: {AGAIN}"
    words = codecs.getincrementaldecoder("utf-8")("replace").decode(head)
    if all(letter.isprintable() or letter in "\t\n\r" for letter in words) and "\ufffd" not in words:
        return f"is text, not weights: expected a file of torch.save or .safetensors; {AGAIN}"
    return f"is no file of torch.save or .safetensors, or its start is damaged: {AGAIN}"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except MemoryError:
        raise InputError(f"{shown(path)} does not fit into memory") from None
    except Exception:  # of many types; what is wrong is read from the header, not from messages
        raise _safetensors_fault(path) from None


def _safetensors_fault(path: Path) -> InputError:
    """Return what is wrong with a .safetensors file that cannot be read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        text = file.read(length)
    if len(text) < length:
        return damaged(path, f"cut off in its header: {size} of at least {8 + length} bytes are there")
    try:
        tensors = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        ends = [entry["data_offsets"][1] for entry in tensors.values()]
        whole = 8 + length + max(ends, default=0)
        kinds = {str(entry["dtype"]) for entry in tensors.values()}
    except Exception:  # JSON of any form
        return damaged(path, "its header is not readable")
    if size < whole:
        return damaged(path, f"cut off: {size} of {whole} bytes are there")
    if unknown := sorted(kinds - {"F16", "BF16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "BOOL"}):
        return InputError(
            f"{shown(path)} has tensors of type {listed(unknown)}: convert them to float32 and save it again"
        )
    return damaged(path, "its header contradicts itself")


def _read_zip(path: Path, file: BinaryIO, map_location: str | torch.device, shells: bool) -> Any:
    """Return what torch saved as a zip archive; InputError if it is another archive, damaged, or unfolds beyond all measure."""
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
    except Exception:  # zipfile raises anything from BadZipFile to struct.error
        raise damaged(path, f"cut off: the end of its {size} bytes is missing") from None
    names = [entry.filename for entry in entries]
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise InputError(
            f"{shown(path)} is TorchScript, which holds code: save torch.jit.load('{shown(path.name)}').state_dict() with torch.save"
        )
    if any(name.endswith("models/model.json") for name in names):
        raise InputError(
            f"{shown(path)} is a program of torch.export: save torch.export.load('{shown(path.name)}').state_dict with torch.save"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise InputError(
            f"{shown(path)} is numpy's .npz: write it anew by torch.save({{name: torch.from_numpy(array) for name, array in "
            f"numpy.load('{shown(path.name)}').items()}}, 'weights.pt')"
        )
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise InputError(f"{shown(path)} is a zip archive of {listed(names) or 'nothing'}: unpack it first")
    if (unfolded := sum(entry.file_size for entry in entries)) > size + ALLOWANCE:
        raise InputError(
            f"{shown(path)} would unfold from {size} bytes to {unfolded}: not read; save the weights again with torch.save"
        )
    try:
        for entry in entries:
            if not entry.CRC:  # torch was told to write no checksums
                entry.CRC = None  # type: ignore[assignment]  # then zipfile compares none
            with archive.open(entry) as part:
                while part.read(1 << 20):
                    pass
        classes = _classes(path, io.BytesIO(archive.read(pickles[0])))
    except InputError:
        raise
    except Exception:
        raise damaged(path, "its checksums do not agree with its contents") from None
    file.seek(0)
    return _unpickle(path, file, classes, map_location, shells)


def _legacy_classes(path: Path, file: BinaryIO) -> set[str]:
    """Return the classes that a file names which torch saved before 1.6: its fourth pickle holds the value."""
    file.seek(0)
    try:
        for _ in range(3):
            for _ in pickletools.genops(file):
                pass
        classes = _classes(path, file)
    except InputError:
        raise
    except Exception:
        raise damaged(path, "its pickle is not readable") from None
    file.seek(0)
    return classes


def _classes(path: Path, file: BinaryIO) -> set[str]:
    """Return the classes and functions that a pickle names; InputError if it is made to do harm, or of another version."""
    found: set[str] = set()
    words: set[str] = set()
    for operation, argument, _ in pickletools.genops(file):
        if isinstance(argument, str) and len(argument) < 20:
            words.add(argument.lower().replace("-", "_"))
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
            found.add(f"{module}.{name}")
        if operation.name in ("STACK_GLOBAL", "FRAME"):
            raise InputError(
                f"{shown(path)} was saved with a pickle_protocol above 2: save it by torch.save as it comes"
            )
    if "builtins.bytearray" in found or ("_codecs.encode" in found and words & GROWING):
        raise InputError(
            f"{shown(path)} holds bytes that may unfold beyond all measure: not read; save the weights by themselves, "
            "torch.save(checkpoint['state_dict'], ...)"
        )
    if harmful := sorted(name for name in found if name in CODE or name.partition(".")[0] in CODE):
        raise InputError(
            f"{shown(path)} would call {listed(harmful)} when opened, which no weights need: not read; trust it not"
        )
    return found


class Shell:
    """Stands for an object of a class that is not imported, and holds nothing: what it was made of is let go."""

    origin = ""  # module and name of that class

    def __new__(cls, *_: object) -> Any:
        return object.__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class ArrayShell(Shell):
    """Stands for an array of numpy; `tensor` is its values, or None if it holds no numbers."""

    tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, values = state
        if isinstance(kind, TypeShell) and isinstance(values, bytes) and re.fullmatch("[fiub][1248]", str(kind.code)):
            flat = np.frombuffer(values, np.dtype(f"{kind.order}{kind.code}")).astype(f"={kind.code}")
            self.tensor = torch.from_numpy(flat.reshape(shape, order="F" if fortran else "C").copy())


class TypeShell(Shell):
    """Stands for a dtype of numpy."""

    def __init__(self, code: Any = "", *_: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


class DictionaryShell(Shell):
    """Makes a plain dictionary of what was an object of a class derived from it."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


NUMPY = {
    "numpy._core.multiarray._reconstruct": ArrayShell,
    "numpy.core.multiarray._reconstruct": ArrayShell,
    "numpy.dtype": TypeShell,
}


def _shell(name: str) -> tuple[type, str]:
    """Return the class that stands for the one of this name, as `safe_globals` expects it."""
    base = NUMPY.get(name) or (DictionaryShell if DICTIONARY.search(name) else Shell)
    return type(base.__name__, (base,), {"origin": name}), name


def _unpickle(path: Path, file: BinaryIO, classes: set[str], map_location: str | torch.device, shells: bool) -> Any:
    """Return torch's value of a file that names `classes`, of which torch's own few are real and all others shells."""
    stand_in = [_shell(name) for name in sorted(classes)] if shells else []
    try:
        with torch.serialization.safe_globals(stand_in), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location=map_location, weights_only=True)
    except MemoryError:
        raise InputError(f"{shown(path)} does not fit into memory") from None
    except Exception:  # torch raises anything from EOFError to UnpicklingError on a damaged file
        foreign = sorted(
            name for name in classes if not name.startswith(("torch.", "torch._", "collections.", "_codecs."))
        )
        if any(name.startswith("torch.nn.modules.") for name in classes):
            raise whole_model(path, "") from None
        if foreign:
            raise InputError(
                f"{shown(path)} holds objects of {listed(foreign)}, which are not opened: save the weights by themselves, "
                "torch.save(checkpoint['state_dict'], ...)"
            ) from None
        raise damaged(path, "what it says of its tensors is not so") from None


def whole_model(path: Path, name: str) -> InputError:
    """Return the error of a file with a pickled module."""
    model = f"is a whole pickled model ({shown(name)})" if name else "holds a whole pickled model"
    return InputError(f"{shown(path)} {model}, which only its own code can open: {SAVE}")
