"""Take a bilinear classifier apart: the eigenvectors of each class, read from its weights alone.

Reads   CHECKPOINT, of train_bilinear or alike: one bilinear layer
Writes  OUTPUT, a table of a row for each class and eigenvector (.csv), if it is asked for; prints the strongest of each class

    python -m stages.bilinear.decompose models/train_bilinear/digits/regularised/seed0/best.pt --each 2
"""

import argparse
from pathlib import Path

import pandas as pd

from stages.bilinear.decomposition import decompose_bilinear_model, input_basis
from stages.bilinear.training import load_model
from stages.common.files import atomic_path
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run


def decompose(checkpoint: str | Path) -> pd.DataFrame:
    """Return a row for each class and eigenvector, strongest first within a class; InputError of a file that is no such checkpoint.

    label         class, a number
    eigenvalue    how much (eigenvector . image)^2 adds to the class's logit
    share         of the sum of the class's absolute eigenvalues
    eigenvector   array of one number a pixel and channel, as images are read (Pearce et al. 2024, arXiv:2410.08417, section 3)
    """
    model, _ = load_model(checkpoint)
    try:
        artifacts = decompose_bilinear_model(model.double(), input_basis(model.double()))
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    values, vectors = artifacts.eigenvalues.cpu().numpy(), artifacts.eigenvectors_input.cpu().numpy()
    rows = [
        {"label": c, "eigenvalue": value, "share": abs(value) / abs(values[c]).sum(), "eigenvector": vectors[c, k]}
        for c in range(len(values))
        for k, value in enumerate(values[c])
    ]
    table = pd.DataFrame(rows)
    return table.sort_values(["label", "share"], ascending=[True, False], kind="stable", ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the classifier (.pt)")
    parser.add_argument("--each", type=int, default=3, help="eigenvectors printed of each class (default: 3)")
    parser.add_argument("--output", type=Path, help="a file for all of them, without their pixels (.csv)")
    arguments = parser.parse_args()
    pin_threads()
    table = decompose(arguments.checkpoint)
    numbers = table.drop(columns="eigenvector")
    print(numbers.groupby("label").head(arguments.each).to_string(index=False, float_format="{:.3f}".format))
    if arguments.output:
        with atomic_path(arguments.output) as temporary:
            numbers.to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    run(main)
