"""A clone of this commit at smoke scale, and what running its pipeline gives. Used by the tests and by CI.

python tests/tools/reproduction.py check     # the committed metrics come out again, and nothing is left to do after
python tests/tools/reproduction.py check FOLDER    # and what was made is copied there: tests read it (WEIGHTLENS_SMOKE=FOLDER)
python tests/tools/reproduction.py update    # measure them anew, after a change that is meant to change them: half an hour

Everything runs in float32 on the processor. Other processors have other vector instructions, so other orders of sums, so other
roundings, which training amplifies. `update` measures by how much: it runs the scale as it is, and again with first weights that
differ by rounding, on more threads and with older instructions. A metric is checked within TIMES the largest change that was seen
of it, and at least of what is usual for its kind. A metric that moves by a good part of what it can range over is chaotic at this
scale, and only checked for being there, finite and in its range.
"""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import dependencies
import numpy as np
import opened
from dvc.utils.hydra import apply_overrides
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
EXPECTED = ROOT / "tests/expected/smoke.json"

FIXED = {"WEIGHTLENS_PRECISION": "float32", "WEIGHTLENS_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
OLDER = {  # instructions of processors that are ten and twenty years old, for torch, oneDNN, MKL and NumPy's OpenBLAS
    "avx2": ("avx2", "AVX2", "AVX2", "Haswell"),
    "sse4": ("default", "SSE41", "COMPATIBLE", "Nehalem"),
}


def perturbed(seed: int, threads: int = 1, instructions: str | None = None) -> dict[str, str]:
    """Return the environment of a run that rounds otherwise: see perturbed/sitecustomize.py."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OPENBLAS_CORETYPE")
    older = dict(zip(names, OLDER[instructions], strict=True)) if instructions else {}
    folders = os.pathsep.join(str(ROOT / "tests/tools" / name) for name in ("perturbed", "startup"))
    return {"PYTHONPATH": folders, "WEIGHTLENS_PERTURB": str(seed), "WEIGHTLENS_THREADS": str(threads), **older}


RUNS = {
    "as it is": {},
    "first weights": perturbed(1),
    "first weights, 2 threads": perturbed(2, threads=2),
    "first weights, AVX2": perturbed(3, instructions="avx2"),
    "first weights, SSE4": perturbed(4, instructions="sse4"),
    "other first weights": perturbed(5),
    "other first weights, 2 threads, AVX2": perturbed(6, threads=2, instructions="avx2"),
}

TIMES = 5  # a few runs do not show the largest change: with this, any three of six held for the other three
CHAOTIC = 0.3  # of a metric's range: a wider tolerance tells nothing
USUAL = 0.9  # quantile of how much metrics that are alike move


@dataclass(frozen=True)
class Kind:
    """Metrics that can lie in the same range and take steps of the same size."""

    name: str
    pattern: str  # in the metric's key
    low: float
    high: float
    step: float  # the smallest change at this scale, in widths: one image more that is right, one pair in another order


COUNTS = r"/(n|runs|train|test|parameters|pairs|diverged|mask_norm)$|/chosen/|charged_steps"
CHOICES = r"learning_rate|strengths|memory_beta|memory_weight|cosine_peak|/scale$|inside_grid"
SHARES = (
    r"acc|bits|whole|retrieved|coverage|calibrat|share|judge|chance|majority|explained|training|unseen|permuted|between|"
    r"kept_prediction|next_movement|random|flagship|rolled_out|capacity|attention|arithmetic|written|methods"
)
ANY = math.inf  # of steps: what hangs on a choice or on two values may be anything
KINDS = (  # the first that matches counts
    Kind("counts", COUNTS, 0, math.inf, 0),
    Kind("ends of intervals", r"/(low|high)$", -math.inf, math.inf, ANY),
    Kind("choices", CHOICES, 0, math.inf, ANY),
    Kind("roundings", r"/relabelled$|reconstruction_error/(input|hidden|data)", 0, 1e-5, ANY),
    Kind("points", r"acc_points", -100, 100, 0.02),
    Kind("audits of two to four", r"train_auditor/(?!.*ignoring).*(bits|refused|auroc|coverage|calibrat)", 0, 1, ANY),
    Kind("errors of two to four", r"train_auditor/.*(error|half_width)", 0, math.inf, ANY),
    Kind("variances of two to four", r"train_auditor/(?!.*ignoring).*r2", -math.inf, 1, ANY),
    Kind("sixths", r"retrieved|whole", 0, 1, 1 / 6),
    Kind("sixty bits", r"recover_memory/.*(bits|permuted)", 0, 1, 0.1),
    Kind("explained variances", r"r2", -math.inf, 1, 0.01),
    Kind("correlations of three networks", r"held_out|all_architectures", -1, 1, 2 / 3),
    Kind("correlations", r"/tau/|learning_curve|arithmetic/cosine|correlation|geometry|similarity", -1, 1, 2 / 15),
    Kind("errors and costs", r"loss|error|cost|half_width|one_sided$", 0, math.inf, 0.01),
    Kind("differences of shares", r"gap|difference|transfer|forgetting|minus", -1, 1, 0.03),
    Kind("shares", SHARES, 0, 1, 0.03),
    Kind("others", r"", -math.inf, math.inf, 0),
)


def kind_of(key: str) -> Kind:
    """Return the first kind whose pattern is in a metric's key."""
    return next(kind for kind in KINDS if re.search(kind.pattern, key))


def width(key: str, values: list[float]) -> float:
    """Return what a metric's changes are measured against: the larger end of its range, or its own size if there is none."""
    kind = kind_of(key)
    ends = [abs(end) for end in (kind.low, kind.high) if math.isfinite(end) and end]
    return max(ends or map(abs, values)) or 1.0


def scale_overrides(name: str) -> list[str]:
    """Return the `key=value` settings of a scale: what `dvc exp run $(grep -v '#' stages/scales/<name>.args)` sets."""
    words = shlex.split((ROOT / f"stages/scales/{name}.args").read_text(), comments=True)
    assert words[::2] == ["-S"] * len(words[1::2])
    return words[1::2]


@cache
def overridden(text: str, *settings: str) -> str:
    """Return the text of a params.yaml with `key=value` settings, as `dvc exp run -S` writes it; it takes DVC half a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.yaml")
        path.write_text(text)
        apply_overrides(path, list(settings))  # raises on a key that the text lacks
        return path.read_text()


def set_params(path: Path, settings: list[str]) -> None:
    """Change a params.yaml by `key=value` settings; what a process has set once before, it does not compute again."""
    path.write_text(overridden(path.read_text(), *settings))


def built_zoos() -> list[str]:
    """Return the architectures whose zoos params.yaml has the pipeline build."""
    return list(dependencies.lookup(dependencies.read_params(), "train_weightnet.tasks.architectures"))


def command(folder: Path, *words: str) -> str:
    """Run a command in `folder` and return what it prints; its errors are shown and raised."""
    done = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed in {folder}:\n{done.stdout}")
    return done.stdout


def clone(source: Path, target: Path) -> Path:
    """Clone the commit at `source`'s HEAD, able to commit, without DVC's cache."""
    command(source.parent, "git", "clone", "--quiet", str(source), str(target))
    for key, value in (("user.name", "test"), ("user.email", "test@localhost")):
        command(target, "git", "config", key, value)
    return target


def smoke_clone(target: Path) -> Path:
    """Clone the project and set its params to smoke scale, as `dvc exp run $(grep -v '#' stages/scales/smoke.args)` would.

    Without dvc.lock, which is of another scale: DVC reads and writes all of it, a second or two, after every stage.
    """
    clone(ROOT, target)
    (target / "dvc.lock").unlink()
    set_params(target / "params.yaml", scale_overrides("smoke"))
    return target


def flatten(value: object, key: str) -> dict[str, float]:
    """Return every number of nested mappings by the path to it, which begins with `key`."""
    if isinstance(value, dict):
        return {k: v for name, item in value.items() for k, v in flatten(item, f"{key}/{name}").items()}
    return {key: value}


def metrics(project: Path) -> dict[str, float]:
    """Return every number of the summaries in a project's working folder, by file and key."""
    paths = sorted(path.relative_to(project) for path in project.glob("reports/**/summary.json"))
    return {k: v for path in paths for k, v in flatten(json.loads((project / path).read_text()), str(path)).items()}


def alike(key: str) -> tuple[str, str, str]:
    """Return what metrics share that change alike: their stage, kind and the end of their key."""
    words = [word for word in key.split("/") if not re.fullmatch(r"[\d.]+", word)]
    return words[1], kind_of(key).name, "/".join(words[-2:])


def measure(runs: list[dict[str, float]]) -> dict[str, dict]:
    """Return, of metrics of a run and of perturbed ones, what `differences` compares with: value, tolerance or range.

    A metric that did not move may have been lucky, so each gets what is usual among those like it.
    """
    first, *others = runs
    spreads = {key: max(abs(run[key] - first[key]) for run in others) for key in first}
    widths = {key: width(key, [run[key] for run in runs]) for key in first}
    moves: dict[tuple[str, str, str], list[float]] = {}
    for key in first:
        moves.setdefault(alike(key), []).append(spreads[key] / widths[key])
    usual = {group: float(np.quantile(values, USUAL)) for group, values in moves.items()}
    measured = {}
    for key, value in first.items():
        kind = kind_of(key)
        tolerance = max(TIMES * spreads[key], max(TIMES * usual[alike(key)], kind.step) * widths[key])
        measured[key] = {"value": value, "spread": spreads[key]}
        if tolerance > CHAOTIC * widths[key]:
            measured[key]["range"] = [end if math.isfinite(end) else None for end in (kind.low, kind.high)]
        else:
            measured[key]["tolerance"] = tolerance
    return measured


def differences(got: dict[str, float], expected: dict[str, dict]) -> list[str]:
    """Return a line for every metric that is missing, new, or further off than its tolerance or outside its range."""
    lines = [f"{key}: missing" for key in sorted(expected.keys() - got.keys())]
    lines += [f"{key}: not expected" for key in sorted(got.keys() - expected.keys())]
    for key in sorted(expected.keys() & got.keys()):
        value, known = got[key], expected[key]
        if "range" in known:
            low, high = known["range"]
            if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
                lines.append(f"{key}: expected a number in {known['range']}, got {value:g}")
        elif not abs(value - known["value"]) <= known["tolerance"]:
            lines.append(f"{key}: expected {known['value']:g} ± {known['tolerance']:.2g}, got {value:g}")
    return lines


def counts(measured: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Return, in all and of each stage, how many metrics are checked by value and how many are chaotic."""
    rows: dict[str, dict[str, int]] = {}
    for key, known in measured.items():
        for name in ("all", Path(key).parts[1]):
            row = rows.setdefault(name, {"by value": 0, "chaotic": 0})
            row["chaotic" if "range" in known else "by value"] += 1
    return rows


def copy_made(project: Path, folder: Path) -> None:
    """Copy what a project's stages have made, and no file that git tracks, to a folder."""
    listing = ("git", "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "data", "models", "reports")
    for path in filter(None, command(project, *listing).split("\0")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project / path, folder / path)


def run_smoke(
    environment: dict[str, str], quiet: bool = False, twice: bool = False, keep: Path | None = None
) -> dict[str, float]:
    """Run the smoke scale in a fresh clone and return its metrics; `twice`: a second run must find nothing to do, and no stage
    may have opened what dvc.yaml does not list; keep: a folder for what was made."""
    with tempfile.TemporaryDirectory() as folder:
        project = smoke_clone(Path(folder, "clone"))
        log = project.with_name("opened")
        environment = environment | (opened.recording(log) if twice else {})
        words = [sys.executable, "-m", "stages.reproduce", "--no-run-cache"]
        output = subprocess.PIPE if quiet else None
        done = subprocess.run(words, cwd=project, env=os.environ | FIXED | environment, stdout=output, stderr=output)
        if done.returncode:
            sys.exit(f"the smoke scale failed{': ' + done.stdout.decode()[-2000:] if quiet else ''}")
        if twice and (lines := opened.slips(project, log)):
            sys.exit("\n".join(lines))
        if twice and "Running stage" in (again := command(project, "dvc", "repro")):
            sys.exit(f"the second repro had something to do:\n{again}")
        if keep:
            copy_made(project, keep)
        return metrics(project)


def update() -> None:
    """Run everything in RUNS, as many at a time as there are cores; what is finished is kept for another try."""
    commit = command(ROOT, "git", "rev-parse", "HEAD").strip()
    work = ROOT / ".work/reproduction" / commit
    work.mkdir(parents=True, exist_ok=True)

    def run(name: str) -> dict[str, float]:
        path = work / f"{name}.json"
        if not path.is_file():
            text = json.dumps(run_smoke(RUNS[name], quiet=True))
            path.write_text(text)
        return json.loads(path.read_text())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = measure(list(tqdm(pool.map(run, RUNS), "smoke runs", len(RUNS))))
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(known)}" for key, known in measured.items())
    head = f' "counts": {json.dumps(counts(measured))},\n "runs": {json.dumps(list(RUNS))},\n "metrics": {{\n'
    EXPECTED.write_text(f"{{\n{head}{rows}\n }}\n}}\n")
    print(f"wrote {EXPECTED.relative_to(ROOT)}: {counts(measured)['all']}")


def check(keep: Path | None) -> None:
    """Run the smoke scale and compare its metrics with the committed ones."""
    expected = json.loads(EXPECTED.read_text())["metrics"]
    got = run_smoke({}, twice=True, keep=keep)
    if lines := differences(got, expected):
        sys.exit("\n".join([f"{len(lines)} of {len(got)} metrics do not reproduce:", *lines]))
    row = counts(expected)["all"]
    print(f"{row['by value']} metrics reproduce, {row['chaotic']} are in their range, and a second repro does nothing")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["update"]:
            update()
        case ["check", *folder] if len(folder) <= 1:
            check(Path(folder[0]) if folder else None)
        case _:
            sys.exit(__doc__)
