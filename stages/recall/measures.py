"""How well an auditor recalls what fine-tunes never seen were trained on, and what it refuses.

Axes: n and m fine-tunes, w weights of a network, r responses, t of a characteristic, k numbers of a recipe.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from stages.common.files import Summary
from stages.common.metrics import binary_calibration_error, bootstrap_interval
from stages.common.runtime import parallel_map
from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.recall.adapters import check_ranks, forms_of
from stages.recall.auditor import BINARY, Kind, Part, unsureness
from stages.recall.decoders import fit_decoder, mean_of_items, r_squared, r_squared_interval, right_bits
from stages.recall.fleet_files import Fleet
from stages.recall.functional_vit import Base
from stages.recall.honesty import Respond, check_marks
from stages.recall.objective import Objective
from stages.recall.tampering import tampered

STACK = 20  # networks that answer together


def run_networks(base: Base, changes: Float[np.ndarray, "n w"], images: Tensor) -> Float[np.ndarray, "n r"]:
    """Return the responses of base + change, of many changes."""
    objective, patches = Objective(base, "labels", 0.0), base.patchify(images)
    respond = vmap(objective.respond, in_dims=(0, None, None))

    def run_stack(rows: Float[np.ndarray, "s w"]) -> Float[np.ndarray, "s r"]:
        with torch.no_grad():
            return respond(objective.start + torch.from_numpy(rows), objective.frozen, patches).numpy()

    stacks = [changes[i : i + STACK].astype(np.float32) for i in range(0, len(changes), STACK)]
    return np.concatenate(parallel_map(run_stack, stacks, torch.device("cpu")))


def score(key: str, predicted: np.ndarray, true: np.ndarray, mean: np.ndarray) -> float:
    """Return the share of bits that are right, or R² around the mean of what was learned from."""
    return float(right_bits(predicted, true).mean()) if key in BINARY else r_squared(predicted, true, mean)


def without_recipe(values: Float[np.ndarray, "n t"], recipe: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n t"]:
    """Return values minus what a linear regression on the recipe tells of them."""
    x = np.column_stack([np.ones(len(recipe)), recipe])
    return values - x @ np.linalg.lstsq(x, values, rcond=None)[0]


def recalled(
    part: Part,
    fleet: Fleet,
    rows: np.ndarray,
    learned: dict[str, np.ndarray],
    resamples: int,
    respond: Respond | None = None,
) -> dict[str, Summary]:
    """Return how well a part recalls each characteristic of some fine-tunes, and how often its intervals hold."""
    networks = fleet.change[rows], fleet.responses[rows]
    descriptions, judged = part.reader.read(*networks), part.judge(networks, respond)
    unsure = unsureness(judged.distance)[:, None]
    measured: dict[str, Summary] = {}
    for key, predicted in part.decode(descriptions).items():
        true, mean = fleet.truth[key][rows].reshape(len(rows), -1).astype(np.float64), learned[key].mean(0)
        decoder, measure = part.decoders[key][1], measure_of(key)
        if key in BINARY:
            right = right_bits(predicted, true).mean(1)
            interval = bootstrap_interval(mean_of_items, right, resamples=resamples)
        else:
            interval = r_squared_interval(predicted, true, mean, resamples)
        ignoring = score(key, np.broadcast_to(mean, true.shape), true, mean)
        measured[key] = {measure: interval, f"{measure}_ignoring_the_network": ignoring}
        if key in BINARY:
            chances = decoder.probabilities(decoder.known(predicted), decoder.doubt(predicted))
            measured[key]["calibration_error"] = binary_calibration_error(chances.ravel(), true.ravel() > 0.5)
        else:
            half = decoder.half_width(predicted) * decoder.doubt(predicted) * unsure
            inside = np.abs(predicted - true) <= half
            measured[key] |= {"coverage": float(inside.mean()), "half_width": float(half.mean())}
            if key == "proportions":  # of classes that are absent an interval is easy
                measured[key]["coverage_present"] = float(inside[true > 0].mean())
        if key == "log2_size":
            measured[key]["error_in_doublings"] = float(np.abs(predicted - true).mean())
        if "recipe" in fleet.truth and len(rows) > 2 * fleet.truth["recipe"].shape[1]:
            p, t = (without_recipe(values, fleet.truth["recipe"][rows]) for values in (predicted, true))
            if t.any():  # of clean labels there is no noise to recall
                measured[key]["r2_recipe_removed"] = r_squared(p, t, np.zeros(t.shape[1]))
    return measured


def measure_of(key: str) -> str:
    """Return the name of a characteristic's score."""
    return "bits" if key in BINARY else "r2"


def from_recipe_alone(fleet: Fleet, learned: Float[np.ndarray, "n t"], key: str) -> float:
    """Return the score of a decoder that reads the recipe, of which a network says nothing."""
    recipe, true = (fleet.truth[name].reshape(len(fleet.test), -1).astype(np.float64) for name in ("recipe", key))
    predicted = fit_decoder(recipe[fleet.learned], true[fleet.learned]).predict(recipe[fleet.held_out])
    return score(key, predicted, true[fleet.held_out], learned.mean(0))


def marked(kind: Kind, change: Float[np.ndarray, "n w"], base: Float[np.ndarray, " w"], layout: Layout) -> np.ndarray:
    """Return which changes bear a mark of what was done after training: on single weights, or of adapters in their ranks."""
    marks = []
    for row in change.astype(np.float32):
        try:
            if kind == "adapter":
                check_ranks("", forms_of(row, layout))
            else:
                check_marks("", base + row, row, layout)
            marks.append(False)
        except InputError:
            marks.append(True)
    return np.array(marks)


def refusals(
    kind: Kind, part: Part, fleet: Fleet, outside: dict[str, Fleet], base: Base, respond: Respond
) -> dict[str, dict[str, float]]:
    """Return how often fine-tunes never seen are refused, altered ones that an alteration changes, and fine-tunes by other recipes."""
    rows, start = fleet.held_out, base.start.numpy()
    change, layout = fleet.change[rows], fleet.layout
    honest = part.judge((change, fleet.responses[rows]), respond).distance

    def measure(changes: Float[np.ndarray, "n w"], far: Float[np.ndarray, " n"]) -> dict[str, float]:
        marks = marked(kind, changes, start, layout)
        return {"refused": float(((far > 1) | marks).mean()), "auroc": auroc(far, honest)}

    rates = {"honest": measure(change, honest)}
    for name, altered in tampered(change, start, layout, kind).items():
        moved = (altered != change).any(1)  # a change of norms alone has no rank to cut
        altered = altered[moved if moved.any() else slice(None)].astype(np.float32)
        rates[name] = measure(altered, part.judge((altered, respond(altered)), respond).distance)
    for name, other in outside.items():
        rates[name] = measure(other.change, part.judge((other.change, other.responses), respond).distance)
    return rates


def auroc(odd: Float[np.ndarray, " n"], honest: Float[np.ndarray, " m"]) -> float:
    """Return the chance that an odd one is farther than an honest one."""
    return float((odd[:, None] > honest).mean() + 0.5 * (odd[:, None] == honest).mean())
