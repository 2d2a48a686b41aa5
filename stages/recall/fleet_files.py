"""Fleets on disk: what build_fleet and condense_changes write, and what is to be learned from and what to be tested on.

Axes: n fine-tunes of a fleet, w weights of a network, r responses, f columns of a description, t of a characteristic.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file

from stages.common.files import Metadata, load_metadata, save_arrays
from stages.common.vectors import Layout

BUILD_FLEET = Path("models/build_fleet")
CONDENSE_CHANGES = Path("models/condense_changes")
VARY_RECIPES = Path("models/vary_recipes")
ADAPT_BACKBONE = Path("models/adapt_backbone")

Arrays = dict[str, np.ndarray]


def without_prefix(arrays: Arrays, prefix: str) -> Arrays:
    """Return the arrays whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def with_prefix(arrays: Arrays, prefix: str) -> Arrays:
    """Return the arrays under names that start with a prefix."""
    return {f"{prefix}{name}": array for name, array in arrays.items()}


@dataclass(frozen=True)
class Split:
    """Fine-tunes of which some are kept for tests."""

    test: Bool[np.ndarray, " n"]

    @cached_property
    def learned(self) -> Int[np.ndarray, " l"]:
        """The places of the fine-tunes to learn from."""
        return np.flatnonzero(~self.test)

    @cached_property
    def held_out(self) -> Int[np.ndarray, " h"]:
        """The places of the fine-tunes to test on."""
        return np.flatnonzero(self.test)


@dataclass(frozen=True, kw_only=True)
class Fleet(Split):
    """Fine-tunes of a base: how they changed it, how they respond, and what they were trained on."""

    change: Float[np.ndarray, "n w"]
    responses: Float[np.ndarray, "n r"]
    truth: Arrays  # of each characteristic
    mean_image: Float[np.ndarray, "n 3 h v"]
    scores: dict[str, Float[np.ndarray, " n"]]  # before and after
    metadata: Metadata

    @property
    def layout(self) -> Layout:
        """How a change is cut into tensors."""
        return Layout.from_metadata(self.metadata)

    def save(self, name: str) -> None:
        """Write the fleet called `name`."""
        self.save_at(BUILD_FLEET / name / "fleet.safetensors")

    def save_at(self, path: Path) -> None:
        """Write the fleet."""
        arrays = {"change": self.change, "responses": self.responses, "mean_image": self.mean_image, "test": self.test}
        arrays |= with_prefix(self.scores, "score_") | with_prefix(self.truth, "true.")
        save_arrays(path, arrays, self.metadata)

    @classmethod
    def load(cls, name: str) -> Self:
        """Read the fleet called `name`; InputError if it is missing."""
        return cls.load_at(BUILD_FLEET / name / "fleet.safetensors")

    @classmethod
    def load_at(cls, path: Path) -> Self:
        """Read a fleet; InputError if it is missing."""
        metadata, arrays = load_metadata(path), load_file(path)
        return cls(
            arrays["test"],
            change=arrays["change"],
            responses=arrays["responses"],
            truth=without_prefix(arrays, "true."),
            mean_image=arrays["mean_image"],
            scores=without_prefix(arrays, "score_"),
            metadata=metadata,
        )


@dataclass(frozen=True, kw_only=True)
class CondensedFleet(Split):
    """Fine-tunes in few numbers: descriptions of how they changed and respond, and what there is to recall."""

    descriptions: dict[str, Float[np.ndarray, "n f"]]
    truth: dict[str, Float[np.ndarray, "n t"]]  # of each characteristic, the mean image's pixels among them
    metadata: Metadata

    @classmethod
    def load(cls, name: str) -> Self:
        """Read the condensed fleet called `name`; InputError if it is missing."""
        path = CONDENSE_CHANGES / f"{name}.safetensors"
        metadata, arrays = load_metadata(path), load_file(path)
        rows = {"mean_image": arrays["mean_image"]} | without_prefix(arrays, "true.")
        others = ("test", "mean_image")
        return cls(
            arrays["test"],
            descriptions={k: v for k, v in arrays.items() if "." not in k and k not in others},
            truth={key: values.reshape(len(values), -1) for key, values in rows.items()},
            metadata=metadata,
        )


def save_condensed(name: str, fleet: Fleet, descriptions: Arrays) -> None:
    """Write a fleet's descriptions, and what there is to recall."""
    arrays = descriptions | {"test": fleet.test, "mean_image": fleet.mean_image} | with_prefix(fleet.truth, "true.")
    save_arrays(CONDENSE_CHANGES / f"{name}.safetensors", arrays, fleet.metadata)
