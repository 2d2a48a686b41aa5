"""Take a bilinear classifier apart: the eigenvectors of each class, read from its weights alone.

Reads   CHECKPOINT, of train_bilinear or of others (see stages.bilinear.layouts): one bilinear layer
Writes  OUTPUT, a table of a row for each class and eigenvector (.csv), if it is asked for; prints the strongest of each class

    python -m stages.bilinear.decompose models/train_bilinear/digits/regularised/seed0/best.pt --each 2
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

from stages.bilinear.decomposition import decompose_bilinear_model, has_constant, input_basis
from stages.bilinear.layouts import load_classifier
from stages.common.files import atomic_path
from stages.common.runtime import pin_threads
from stages.common.stage import InputError, run


def decompose(checkpoint: str | Path, residual: bool | None = None) -> pd.DataFrame:
    """Return a row for each class and eigenvector, strongest first within a class; InputError of a file that is no such checkpoint.

    residual: whether blocks are h + B(h), where a file does not say it (None: they are not).

    label         class, a number
    eigenvalue    how much (eigenvector . image + constant)^2 adds to the class's logit
    share         of the sum of the class's absolute eigenvalues
    constant      0 without biases and residuals
    eigenvector   array of one number a pixel and channel, as images are read (Pearce et al. 2024, arXiv:2410.08417, section 3)
    """
    model, notes = load_classifier(checkpoint, residual)
    for note in notes:
        print(f"{checkpoint}: {note}", file=sys.stderr)
    try:
        artifacts = decompose_bilinear_model(model.double(), input_basis(model.double()))
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    values, vectors = artifacts.eigenvalues.cpu().numpy(), artifacts.eigenvectors_input.cpu().numpy()
    constants = artifacts.eigenvectors_hidden[:, -1].cpu().numpy() * has_constant(model)
    rows = [
        {
            "label": c,
            "eigenvalue": value,
            "share": abs(value) / abs(values[c]).sum(),
            "constant": constants[c, k],
            "eigenvector": vectors[c, k],
        }
        for c in range(len(values))
        for k, value in enumerate(values[c])
    ]
    table = pd.DataFrame(rows)
    return table.sort_values(["label", "share"], ascending=[True, False], kind="stable", ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the classifier (.pt)")
    parser.add_argument("--each", type=int, default=3, help="eigenvectors printed of each class (default: 3)")
    parser.add_argument(
        "--residual", action="store_true", default=None, help="blocks are h + B(h); only if the file does not say it"
    )
    parser.add_argument("--output", type=Path, help="a file for all of them, without their pixels (.csv)")
    arguments = parser.parse_args()
    pin_threads()
    table = decompose(arguments.checkpoint, arguments.residual)
    numbers = table.drop(columns="eigenvector")
    print(numbers.groupby("label").head(arguments.each).to_string(index=False, float_format="{:.3f}".format))
    if arguments.output:
        with atomic_path(arguments.output) as temporary:
            numbers.to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    run(main)
