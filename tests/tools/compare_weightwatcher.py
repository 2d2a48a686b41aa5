"""weightwatcher's alpha and its best metric on the zoo of digits, by its own package: Kendall's tau of test accuracy, unseen runs of cnn3.

python -m venv .work/weightwatcher
python -c "import site; print(site.getsitepackages()[0])" > .work/weightwatcher/lib/python3.11/site-packages/project.pth
.work/weightwatcher/bin/pip install weightwatcher==0.7.7             # into an environment of its own: the project needs none of it
.work/weightwatcher/bin/python tests/tools/compare_weightwatcher.py          # after `dvc repro train_weightnet`; 10 CPU seconds

Its metrics are means over layers (Martin, Peng and Mahoney 2021). Which way alpha goes, which other metric is best and which way that
goes, is chosen on the validation runs of each split. Prints JSON: mean and standard deviation over splits.
"""

import json
import logging
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import weightwatcher
from scipy.stats import kendalltau

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project need not be installed
from stages.weightnet.predictors.splits import split_zoos
from stages.weightnet.train_weightnet import Params
from stages.weightnet.zoo.architectures import build_network
from stages.weightnet.zoo.reading import Zoo, load_zoo

DATASET, ARCHITECTURE = "digits", "cnn3"
OTHERS = ("log_norm", "log_spectral_norm", "log_alpha_norm", "alpha_weighted", "stable_rank")


def metrics(zoo: Zoo, row: int) -> dict[str, float]:
    """Return weightwatcher's summary of one network."""
    channels, side, _ = zoo.program.input_shape
    network = build_network(zoo.architecture, channels, zoo.program.steps[-1].shape[0], side)
    weights = zoo.networks(torch.tensor([row])).weights
    network.load_state_dict({name: value[0] for name, value in weights.items()})
    watcher = weightwatcher.WeightWatcher(model=network)
    summary = watcher.get_summary(watcher.analyze(min_evals=5))  # by default, layers of fewer than 10 are left out
    return {name: float(value) for name, value in summary.items()}


def tau(zoo: Zoo, found: dict[int, dict[str, float]], rows: list[int], name: str) -> float:
    """Return Kendall's tau of a metric and test accuracy."""
    return float(kendalltau(np.array([found[row][name] for row in rows]), zoo.column("test_acc")[rows]).statistic)


def main() -> None:
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    params, zoo = Params.load("train_weightnet", DATASET, "baselines"), load_zoo(DATASET, ARCHITECTURE)
    fractions = (params.validation_fraction, params.test_fraction)
    taus: dict[str, list[float]] = {"alpha": [], "best": []}
    chosen = []
    for split in range(params.tasks.splits):
        parts = split_zoos(
            {ARCHITECTURE: zoo},
            [ARCHITECTURE],
            [ARCHITECTURE],
            fractions,
            [*params.snapshots],
            1.0,
            params.seed + split,
        )
        validation, test = (part[ARCHITECTURE].tolist() for part in (parts.validation, parts.test))
        found = {row: metrics(zoo, row) for row in (*validation, *test)}
        on_validation = {name: tau(zoo, found, validation, name) for name in ("alpha", *OTHERS)}
        best = max(OTHERS, key=lambda name: abs(on_validation[name]))
        chosen.append(best)
        for label, name in (("alpha", "alpha"), ("best", best)):
            taus[label].append(tau(zoo, found, test, name) * (1 if on_validation[name] > 0 else -1))
    spread = {name: {"mean": statistics.fmean(t), "std": statistics.stdev(t)} for name, t in taus.items()}
    print(json.dumps(spread | {"chosen": chosen, "networks": len(test)}))


if __name__ == "__main__":
    main()
