"""Predict how good networks are, and rank them: python -m stages.weightnet.predict model.safetensors --arch cnn3

A model is a file of weights, a folder of save_pretrained, or a folder of such files. --arch says what it is: an architecture of
the zoo (one of torchvision's too: by its name alone, for the zoo's images and classes); torchvision:<name> or timm:<name>, as they
come; a .json file, {"layers": [{"kind": "Conv2d", "in_channels": 1, ...}, {"kind": "ReLU"}]}, of torch.nn's layers one after the
other; or, with --allow-code, package.module:name or file.py:name, a network, or what makes one when it is called without arguments.
By default weights alone are read.
--allow-probe runs the network on the inputs of an exam that the zoo wrote for itself (no image of a data set), which tells far more,
of any architecture of the zoo's images and classes, also where its symmetry is not known. It may take them flat, of three channels, or
resized (tried out; --input-shape says it), and return logits, probabilities or their logarithms, alone or beside others. How pixels were
scaled is found out, and said (`pixels`); where several of the usual scalings are plausible, intervals hold for each of them, and --pixels
MEAN STD settles it. Released are exams of digits, mnist and fashion_mnist: --dataset says which, where the shape of images leaves it open.

A folder may be a zoo of your own: its metadata.json says for each file what it is and what you measured of it,
{"a.safetensors": {"arch": "cnn3", "activation": "tanh", "test_acc": 0.91}}. Then predictions are compared with measurements. Files
and .json architectures are named from the folder.

The network's steps are compared with the module itself before anything is predicted, and where weights are read, the symmetry is
derived from them and tried out. Prints a table, or JSON with --json: each property with an interval for 90 % of networks (by errors on
validation networks; of the exam, on architectures that were left out, and wider, the less the network is like the zoo's), the most
alike networks of the zoo, and what of the weights lies outside all that the zoo has. `unlike` is the share of the zoo's networks that
lie nearer to their own neighbours, by their weights, or in an exam, that it would be surer of, were their architecture new to it: above
0.95 it says not to trust the prediction. Several networks are ranked by predicted test accuracy. Where `dvc repro` has trained no
predictor, the released one predicts, and the answer says so.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from stages.common.checkpoints import PRETRAINED, READABLE, SUFFIXES, load_torch, load_weights
from stages.common.files import load_json
from stages.common.released import published
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run
from stages.weightnet.as_classifier import GIVEN, Shape, border_of, described
from stages.weightnet.pixels import (
    UNSCALED,
    black,
    hull,
    plausible,
    told_by_weights,
    usual_scalings,
    what_is_said,
    what_is_said_of_borders,
)
from stages.weightnet.predictors.ensemble import Ensemble, revive
from stages.weightnet.predictors.exam import asker, mark
from stages.weightnet.predictors.examiner import Examiner
from stages.weightnet.predictors.statistics import pooled_statistics, what_is_outside
from stages.weightnet.predictors.targets import EDGE, own_units
from stages.weightnet.tracing.program import Program, bordered_input, logarithm_of, rescaled_input
from stages.weightnet.tracing.recording import plain
from stages.weightnet.user_networks import (
    add_network_arguments,
    bordered_program,
    build_classifier,
    in_own_process,
    read_network,
    user_program,
    zoos_that_fit,
)
from stages.weightnet.zoo.architectures import ARCHITECTURES, zoo_program
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES, range_of

if TYPE_CHECKING:
    import pandas as pd

PREDICTORS, RELEASED = Path("models/train_weightnet"), Path("models/released")
LEAST = 1e-7  # probability, in float32
PROBABILITIES = "its outputs are probabilities: their logarithms were taken for logits"
TRUSTED = 0.95  # of the zoo's networks that lie nearer to their own neighbours: above, what was learned says little
NEAREST = 3  # networks of the zoo that are named
WORST_LOSS = 20.0  # nats, of a network that is sure and wrong: there is no upper end
SEEN = ("relu", "tanh")  # the activations of the zoo's networks
DEFAULT = "digits"
WARNING = "do not trust this"


class OnPixels(nn.Module):
    """A network whose images come in units of its pixels' deviation, around their mean; it puts a black border around them, if told."""

    def __init__(self, network: nn.Module, mean: float, std: float, border: int = 0, black: float = 0.0) -> None:
        super().__init__()
        self.network, self.mean, self.std, self.border, self.black = network, mean, std, border, black

    def forward(self, images: Tensor) -> Any:
        images = pad(images, [self.border] * 4, value=self.black) if self.border else images
        return self.network(images * self.std + self.mean)


Scaled = Callable[[float, float], Networks | nn.Module]  # gives a network for pixels of a mean and a deviation


def find_marks(
    known: "Known",
    asked: "Asked",
    examiner: Examiner,
    scaled: Scaled,
    network: Networks | None = None,
    bordered: tuple[Scaled, Networks | None, int] | None = None,
) -> tuple[Float[Tensor, "p r"], list[str]]:
    """Return a network's marks for every plausible scaling of its pixels, the most plausible first, and what is said of that.

    network: itself, if its steps are known; bordered: the same for images that got a border of so many black pixels, where they may
    have got one instead of being resized.
    """
    scalings = usual_scalings(known.dataset)
    if settled := asked.pixels is not None or len(scalings) == 1:
        scalings = {"": asked.pixels or UNSCALED}
    readings = {False: (scaled, network, 0)} | ({True: bordered} if bordered else {})  # by whether there is a border
    told: dict[bool, str] = {}
    marks: dict[tuple[bool, str], Float[Tensor, "1 r"]] = {}
    for is_bordered, (give, own, border) in readings.items():
        mean_image = known.mean_image
        if border and mean_image is not None:
            mean_image = pad(mean_image, [border] * 4, value=black(known.dataset))
        left, told[is_bordered] = ([""], "") if settled else told_by_weights(own, scalings, mean_image)
        for name in left:
            marks[is_bordered, name] = mark(examiner.exam, give(*scalings[name])).flatten(1)
    names = list(marks) if len(marks) == 1 else plausible(examiner, marks)
    left, notes = list(dict.fromkeys(name for _, name in names)), []
    if not settled:
        notes.append(what_is_said(left, scalings, told[names[0][0]]))
    if bordered:
        notes.append(what_is_said_of_borders([is_bordered for is_bordered, _ in names]))
    return torch.cat([marks[name] for name in names]), notes


def are_probabilities(outputs: Float[Tensor, "... k"]) -> bool:
    """Return whether rows of outputs are probabilities, not logits."""
    return bool((outputs >= 0).all()) and torch.allclose(outputs.sum(-1), torch.ones_like(outputs[..., 0]), atol=1e-4)


class Logarithm(nn.Module):
    """The logarithm of a network's probabilities: its logits, but for a constant."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).clamp(min=LEAST).log()


def user_marks(
    known: "Known", examiner: Examiner, path: Path, arch: str, asked: "Asked"
) -> tuple[Float[Tensor, "p m"], list[str]]:
    """Return the marks of a network whose steps are not known, by its outputs alone, as `find_marks` does; InputError if they are none."""
    exam = examiner.exam
    shape, classes = tuple(exam.inputs.shape[2:]), exam.consensus.shape[-1]

    def ask_module() -> tuple[list[list[float]], list[str]]:
        module, given = build_classifier(arch, shape, classes, asked.allow_code, asked.input_shape)
        own = {name: tuple(t.shape) for name, t in module.state_dict().items() if t.is_floating_point()}
        found, _ = load_weights(path, own, (), torch.float32, f"--arch {arch}")
        module.load_state_dict(found, strict=False)  # it counts batches
        try:
            with torch.no_grad():
                outputs = module(exam.inputs[0])
        except Exception as error:  # others' code may raise anything
            takes = list(asked.input_shape or shape)
            why = f"cannot run on images {takes} ({plain(error)}): is that their shape (--input-shape)?"
            raise InputError(f"--arch {arch} {why}") from None
        if not isinstance(outputs, Tensor) or outputs.shape != (len(exam.inputs[0]), classes):
            got = list(outputs.shape[1:]) if isinstance(outputs, Tensor) else described(outputs)
            raise InputError(f"{path}: the exam needs {classes} logits for an image, and {arch} gives {got}")
        notes = ["its steps cannot be followed: judged by its outputs alone", *given]
        if are_probabilities(outputs):
            module, notes = Logarithm(module), [*notes, PROBABILITIES]
        border, value = border_of(module, shape), black(known.dataset)
        bordered = None
        if border and value is not None:
            bordered = partial(OnPixels, module, border=border, black=value), None, border
        marks, said = find_marks(known, asked, examiner, partial(OnPixels, module), bordered=bordered)
        return marks.tolist(), [*notes, *said]

    marks, notes = in_own_process(ask_module, arch)
    return torch.tensor(marks), notes


def list_models(path: Path) -> dict[Path, dict[str, Any]]:
    """Return a file of weights, or those of a folder, with what the folder's metadata.json says of each."""
    if not path.is_dir() or any((path / name).is_file() for name in PRETRAINED):
        return {path: {}}
    metadata = path / "metadata.json"
    known = load_measured(metadata) if metadata.is_file() else {}
    if absent := [name for name in sorted(known) if not (path / name).exists()]:
        raise InputError(f"{metadata} names {absent[0]}, which is not there")
    files = [file for file in path.iterdir() if file.suffix in SUFFIXES and not file.name.startswith(".")]
    names = sorted({file.name for file in files} | set(known))
    if not names:
        raise InputError(f"{path} has no files of weights ({', '.join(SUFFIXES)})")
    return {path / name: known.get(name, {}) for name in names}


def load_measured(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a metadata.json says of each file; InputError if it is broken, or a measurement is no finite number."""
    try:
        known = load_json(path)
        numbers = [
            (file, name, float(value))
            for file, said in known.items()
            for name, value in said.items()
            if name in PROPERTIES or isinstance(value, float)
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f'{path} ({plain(error)}): expected {{"<file>": {{"arch": ..., "test_acc": ...}}}}') from None
    for file, name, number in numbers:
        low, high = range_of(name)
        if not (math.isfinite(number) and low <= number <= high):
            raise InputError(f"{path}: {file}: {name} is {number:g}: expected a number from {low:g} to {high:g}")
    for said in known.values():
        if str(said.get("arch", "")).endswith(".json"):
            said["arch"] = str(path.parent / said["arch"])
    return known


def agreement(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return Kendall's tau of predicted and measured values, for properties that were measured of at least three networks."""
    found = {}
    for name in next(iter(results.values()))["properties"]:
        pairs = [
            (r["properties"][name]["value"], r["measured"][name]) for r in results.values() if name in r["measured"]
        ]
        if len(pairs) < 3:
            continue
        from scipy.stats import kendalltau  # here: 60 MB that most calls do without

        tau = float(kendalltau(*zip(*pairs, strict=True)).statistic)
        if math.isfinite(tau):  # of values that are all the same there is none
            found[name] = {"tau": tau, "n": len(pairs)}
    return found


def list_notes(program: Program) -> list[str]:
    """Return what people should know of a network: what was left out of it, and how it differs from the zoo's in kind."""
    notes = [f"activation {name}: not in the zoo" for name in program.activations if name not in SEEN]
    return [*program.notes, *notes, *([] if program.activations else ["no activation: not in the zoo"])]


def inside(ends: tuple[float, float], low: float, value: float, high: float, edge: float = 0.0) -> dict[str, float]:
    """Return a value moved into its range, with as wide an interval to either side as the range allows.

    An interval that comes as near as `edge` to an end of the range reaches it: predictors take what lies there for the same.
    """
    least, most = ends
    nearest = min(max(value, least), most)
    low, high = max(nearest - (value - low), least), min(nearest + (high - value), most)
    low, high = (least if low <= least + edge else low), (most if high >= most - edge else high)
    return {"low": low, "value": nearest, "high": high}


@dataclass(frozen=True)
class Known:
    """A predictor that was kept, of weights alone or an exam, and what is known of the zoo that it learned from."""

    file: Path
    family: str
    predictor: Ensemble | Examiner
    shape: tuple[int, ...]  # of images
    classes: int
    ranges: Float[Tensor, "2 f"]  # of statistics of weights
    mean_image: Float[Tensor, "c h w"] | None = None  # of the data set, in the zoo's units

    @property
    def dataset(self) -> str:
        """The data set of the zoo, by the file's name or its folder's."""
        name = self.file.parent.name if self.file.name == "predictors.pt" else self.file.stem
        return name.removesuffix(f"-{self.family}")


def find_predictor(dataset: str, family: str) -> Path:
    """Return the file of a data set's predictor: the one that was trained here, else the released one; else InputError says how."""
    trained, released = PREDICTORS / f"{dataset}-{family}" / "predictors.pt", RELEASED / f"{dataset}-{family}.pt"
    if trained.is_file() or not (found := there(family)):
        return trained
    if published(released).is_file():
        return released
    raise InputError(
        f"no predictor of a zoo of {dataset} is there (there: {', '.join(found)}): "
        f"add it to build_zoo.datasets and run 'dvc repro train_weightnet@{dataset}-{family}'"
    )


def there(family: str) -> list[str]:
    """Return the data sets of which a predictor is there."""
    trained = [file.parent.name for file in PREDICTORS.glob(f"*-{family}/predictors.pt")]
    names = [*trained, *(file.stem for file in published(RELEASED).glob(f"*-{family}.pt"))]
    return sorted({name.removesuffix(f"-{family}") for name in names})


def load_known(path: Path, family: str) -> Known:
    """Return the predictor of a file."""
    state = load_torch(path, {family})[family]
    shape, classes = tuple(state["input_shape"]), state["classes"]
    program, symmetry = zoo_program(next(iter(ARCHITECTURES)), shape[0], classes, shape[1])
    zeros = {key: torch.zeros(1, *size) for key, size in program.layout.shapes.items()}
    example = Networks(program, symmetry, zeros, torch.tensor([False]))
    mean_image = state["mean_image"].float() if "mean_image" in state else None
    return Known(path, family, revive(state, example), shape, classes, state["ranges"], mean_image)


def nearest_networks(known: Known, distances: Float[Tensor, " n"]) -> list[dict[str, Any]]:
    """Return the zoo's most alike networks: their names, how far they are, and their test accuracy."""
    predictor = known.predictor
    measured = own_units(predictor.targets, predictor.scale, predictor.measured)
    skill = measured[:, predictor.measured.index("test_acc")].tolist()
    return [
        {
            "name": predictor.names[i],
            "distance": distances[i].item(),
            "test_acc": None if math.isnan(skill[i]) else skill[i],
        }
        for i in distances.argsort()[:NEAREST].tolist()
    ]


def describe(
    known: Known, intervals: Float[Tensor, "3 k"], read: Float[Tensor, "1 r"], outside: list[str], notes: list[str]
) -> dict[str, Any]:
    """Return the predictions for one network, and by what was read of it, which of the zoo's networks it is like and how unlike."""
    predictor = known.predictor
    if not (intervals.isfinite().all() and read.isfinite().all()):
        raise InputError("its weights are so large that the predictions are no finite numbers")
    properties = {
        name: inside(range_of(name), *ends, edge=EDGE * name.endswith("_acc"))
        for name, *ends in zip(predictor.measured, *intervals.tolist(), strict=True)
    }
    distances = torch.cdist(read.to(predictor.inputs), predictor.inputs)[0]
    unlike = predictor.unlike(read.to(predictor.inputs))
    if unlike > TRUSTED:  # errors on networks like the zoo's say nothing of this one's
        said = f"{WARNING}: it is more unlike the zoo's networks than {unlike:.0%} of them are unlike each other"
        notes = [said, *notes]
        for name, found in properties.items():
            least, most = range_of(name)
            if name == "test_loss":
                most = max(found["high"], WORST_LOSS)
            if math.isfinite(least):  # of a property of one's own no ends are known
                found["low"], found["high"] = least, most
    return {
        "properties": properties,
        "unlike": unlike,
        "trusted": unlike <= TRUSTED,
        "nearest": nearest_networks(known, distances),
        "outside": outside,
        "notes": notes,
    }


def describe_networks(
    known: Known, networks: Networks, marks: Float[Tensor, "p r"] | None = None, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what is said of one network whose steps are known.

    marks: of an exam, for every plausible scaling of its pixels; notes: more that people should know of it.
    """
    shape, zoo = ("x".join(map(str, images)) for images in (networks.program.input_shape, known.shape))
    outside = what_is_outside(pooled_statistics(networks)[0], known.ranges)
    outside += [f"images of {shape}, the zoo's {zoo}"] if shape != zoo else []
    notes = [*list_notes(networks.program), *notes]
    if marks is not None and isinstance(known.predictor, Examiner):
        return describe_marks(known, known.predictor, marks, outside, notes)
    intervals, read = known.predictor.intervals(networks), known.predictor.read(networks)
    return describe(known, intervals[:, 0], read, outside, notes)


def describe_marks(
    known: Known, examiner: Examiner, marks: Float[Tensor, "p r"], outside: list[str], notes: list[str]
) -> dict[str, Any]:
    """Return what is said of one network by its marks for every plausible scaling of its pixels."""
    return describe(known, hull(examiner.intervals_by(marks)), examiner.ridge.standardised(marks[:1]), outside, notes)


def predict_one(
    known: Known, path: Path, arch: str, program: Program | InputError, tanh: bool, asked: "Asked"
) -> dict[str, Any]:
    """Return what is said of the network of a file; program: of its architecture, or why there is none."""
    examiner = known.predictor if isinstance(known.predictor, Examiner) else None
    if isinstance(program, InputError):
        if examiner is None:
            raise program
        marks, notes = user_marks(known, examiner, path, arch, asked)
        return describe_marks(known, examiner, marks, [], notes)
    if examiner is None:
        return describe_networks(
            known, read_network(path, arch, rescaled_input(program, *asked.pixels or UNSCALED), tanh)
        )
    outputs = program.steps[-1].shape
    if outputs != (known.classes,):
        got = ", ".join(map(str, outputs))
        raise InputError(f"the exam is in the zoo's {known.classes} classes, not {got}: leave --allow-probe out")
    network = read_network(path, arch, program, tanh, run=True)
    probabilities = are_probabilities(asker(network)(examiner.exam.inputs[0]))
    if probabilities:
        program = logarithm_of(replace(program, notes=(*program.notes, PROBABILITIES)), LEAST)
        network = replace(network, program=program)

    def scaled(mean: float, std: float) -> Networks:
        return replace(network, program=rescaled_input(program, mean, std))

    bordered = with_border(known, network, arch, asked, probabilities)
    marks, notes = find_marks(known, asked, examiner, scaled, network, bordered)
    return describe_networks(known, network, marks, notes)


def with_border(
    known: Known, network: Networks, arch: str, asked: "Asked", probabilities: bool
) -> tuple[Scaled, Networks, int] | None:
    """Return what `find_marks` asks of a network whose images may have got a black border; None where they have got none."""
    value = black(known.dataset)
    if value is None or not any(note.startswith(GIVEN) for note in network.program.notes):
        return None
    found = bordered_program(arch, known.shape, known.classes, asked.allow_code, asked.input_shape)
    if found is None:
        return None
    program, border = logarithm_of(found[0], LEAST) if probabilities else found[0], found[1]
    larger = replace(network, program=program)

    def scaled(mean: float, std: float) -> Networks:
        return replace(larger, program=bordered_input(rescaled_input(program, mean, std), border, value))

    return scaled, larger, border


@dataclass(frozen=True)
class Asked:
    """What a user says of the networks that are to be predicted."""

    arch: str | None = None  # unless a metadata.json says it
    input_shape: Shape | None = None  # of an image as the network takes it, if not the zoo's
    tanh: bool = False  # a zoo architecture with tanh in place of ReLU
    allow_code: bool = False  # to import and call package.module:function
    pixels: tuple[float, float] | None = (
        None  # mean and deviation of the pixels that they were trained on; None: find out
    )


def predict_all(known: Known, models: dict[Path, dict[str, Any]], asked: Asked) -> dict[str, dict[str, Any]]:
    """Return what is predicted of each model, with what was measured of it."""
    shape, takes = tuple(asked.input_shape or known.shape), None
    if isinstance(known.predictor, Examiner):  # whose inputs are the zoo's images, whatever the network takes
        shape, takes = known.shape, asked.input_shape
    results: dict[str, dict[str, Any]] = {}

    @cache
    def program_of(arch: str) -> Program | InputError:
        try:
            return user_program(arch, shape, known.classes, asked.allow_code, takes)
        except InputError as error:
            return error

    for file, said in models.items():
        arch, tanh = said.get("arch", asked.arch), asked.tanh or said.get("activation") == "tanh"
        if arch is None:
            raise InputError(f"{file}: say what it is by --arch, or in a metadata.json beside it")
        program = program_of(arch)
        try:
            results[str(file)] = predict_one(known, file, arch, program, tanh, asked)
        except InputError as error:
            named = str(error).startswith((str(file), "--arch")) or error is program
            raise error if named else InputError(f"{file}: {error}") from None
        names = known.predictor.measured
        results[str(file)]["measured"] = {name: float(said[name]) for name in names if name in said}
    return results


def fitting_dataset(models: dict[Path, dict[str, Any]], family: str, asked: Asked) -> str:
    """Return the one data set with a predictor whose images and classes the first network takes; InputError if not one does.

    The default one's where a network names no images of its own: weights alone are read, or it is an architecture of the zoo.
    """
    arch = next(iter(models.values())).get("arch", asked.arch)
    if family != "exam" or arch is None or (":" not in arch and not arch.endswith(".json")):
        return DEFAULT
    zoos = {}
    for dataset in there(family):
        known = load_known(published(find_predictor(dataset, family)), family)
        zoos[dataset] = (known.shape, known.classes)
    fitting = zoos_that_fit(arch, zoos, asked.allow_code, asked.input_shape) if zoos else [DEFAULT]
    if len(fitting) > 1:
        raise InputError(
            f"--arch {arch} takes the images of the zoos of {', '.join(fitting)}: say which it learned by --dataset"
        )
    if not fitting:
        have = ", ".join(f"{name} {'x'.join(map(str, shape))}, {k} classes" for name, (shape, k) in zoos.items())
        raise InputError(
            f"--arch {arch} gives no logits for the images of a zoo ({have}): say which it learned by --dataset and what it takes "
            "by --input-shape, or leave --allow-probe out"
        )
    return fitting[0]


def answer_for(paths: Sequence[Path], dataset: str | None, allow_probe: bool, asked: Asked) -> dict[str, Any]:
    """Return everything that is said of some networks, as --json prints it."""
    family = "exam" if allow_probe else "weightnet"
    models = {file: said for path in paths for file, said in list_models(path).items()}
    dataset = dataset or fitting_dataset(models, family, asked)
    known = load_known(published(find_predictor(dataset, family)), family)
    results = predict_all(known, models, asked)
    return {
        "predictor": family,
        "file": str(known.file),
        "learned_from": len(known.predictor.names),
        "networks": results,
        "ranking": sorted(results, key=lambda file: -results[file]["properties"]["test_acc"]["value"]),
        "agreement": agreement(results),
    }


def predict(
    models: Sequence[str | Path] | str | Path,
    arch: str | None = None,
    *,
    dataset: str | None = None,
    allow_probe: bool = False,
    input_shape: tuple[int, ...] | None = None,
    tanh: bool = False,
    allow_code: bool = False,
    pixels: tuple[float, float] | None = None,
) -> "pd.DataFrame":
    """Return a row for each network and property, the networks by predicted test accuracy, best first; arguments as the command has them.

    model        the file
    property     one of PROPERTIES, or of what was measured of a zoo of your own
    value        predicted, low and high: the ends of the interval for 90 % of networks
    measured     what a metadata.json says, or NaN
    unlike       the share of the zoo's own networks that are less unlike it than this one is, 0 to 1
    trusted      whether that is small enough for the value to mean anything

    InputError if a network cannot be read, followed or asked.
    """
    import pandas as pd

    paths = [Path(models)] if isinstance(models, str | Path) else [Path(one) for one in models]
    answer = answer_for(paths, dataset, allow_probe, Asked(arch, input_shape, tanh, allow_code, pixels))
    rows = [
        {"model": file, "property": name, **found, "measured": result["measured"].get(name, math.nan)}
        | {key: result[key] for key in ("unlike", "trusted")}
        for file in answer["ranking"]
        for result in (answer["networks"][file],)
        for name, found in result["properties"].items()
    ]
    columns = ["model", "property", "value", "low", "high", "measured", "unlike", "trusted"]
    return pd.DataFrame(rows)[columns]


def print_answer(answer: dict[str, Any]) -> None:
    """Print a table for each network, then their ranking and how predictions agree with measurements."""
    print(f"{answer['predictor']} of {answer['file']}, learned from {answer['learned_from']} networks")
    for file, result in answer["networks"].items():
        warning = "" if result["trusted"] else f"   {WARNING}"
        print(f"{file} (more unlike the zoo than {result['unlike']:.0%} of its own networks)")
        for name, found in result["properties"].items():
            said = f"   measured {result['measured'][name]:.3f}" if name in result["measured"] else ""
            print(f"  {name:18s} {found['value']:7.3f}   {found['low']:.3f} to {found['high']:.3f}{said}{warning}")
        alike = ", ".join(
            near["name"] + (f" (test_acc {near['test_acc']:.2f})" if near["test_acc"] is not None else "")
            for near in result["nearest"]
        )
        print(f"  most alike: {alike}")
        for outside in result["outside"]:
            print(f"  outside the zoo: {outside}")
        for note in result["notes"]:
            print(f"  {note}")
    if len(answer["networks"]) > 1:
        print("by predicted test accuracy:")
        for place, file in enumerate(answer["ranking"], 1):
            print(f"{place:4d}  {answer['networks'][file]['properties']['test_acc']['value']:.3f}  {file}")
    for name, found in answer["agreement"].items():
        print(f"Kendall's tau of predicted and measured {name}: {found['tau']:.2f} ({found['n']} networks)")


def main() -> None:
    """Read the command line, and print what is predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help=f"files of weights, or folders of them; {READABLE}")
    parser.add_argument("--arch", help="what they are, unless a metadata.json says it")
    parser.add_argument("--dataset", help="the zoo's images (default: those that fit the network, else digits)")
    parser.add_argument(
        "--input-shape",
        type=int,
        nargs="+",
        metavar="N",
        help="of an image as the network takes it: C H W, H W, or a number in a row",
    )
    parser.add_argument("--tanh", action="store_true", help="a zoo architecture with tanh in place of ReLU")
    parser.add_argument("--allow-probe", action="store_true", help="run the network on the inputs of the zoo's exam")
    add_network_arguments(parser)
    parser.set_defaults(pixels=None)  # of the exam: as the network's answers tell
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    pin_threads()
    shape = tuple(arguments.input_shape) if arguments.input_shape else None
    pixels = tuple(arguments.pixels) if arguments.pixels else None
    asked = Asked(arguments.arch, shape, arguments.tanh, arguments.allow_code, pixels)
    answer = answer_for(arguments.models, arguments.dataset, arguments.allow_probe, asked)
    if arguments.json:
        json.dump(answer, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print_answer(answer)


if __name__ == "__main__":
    run(main)
