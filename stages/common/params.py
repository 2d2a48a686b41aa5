"""Stage parameters: params.yaml is the only source of values, and every mistake in it is reported at once."""

from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from stages.common.command import InputError, one_line

PARAMS = Path("params.yaml")


class StageParams(BaseModel):
    """Base of every stage's `Params`: immutable, no unknown keys, no defaults in code.

    A section of params.yaml holds for every item of its stage's matrix; `overrides.<dataset>` changes it for one data
    set, and of `variants` a stage reads the one it is asked for, as its field `variant`:

        train_bilinear:
          datasets: [digits, mnist]     # the matrix: read by DVC, not by the stage
          epochs: 60
          variants:
            regularised: {input_noise: 0.15}
            unregularised: {input_noise: 0.0}
          overrides:
            digits: {}
            mnist: {epochs: 40}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def load(cls, section: str, dataset: str | None = None, variant: str | None = None) -> Self:
        """Read `section` of params.yaml, for one item of its matrix if it has one."""
        values = lookup(section)
        if dataset is not None:
            overrides = lookup(f"{section}.overrides.{dataset}")
            values = _merge({k: v for k, v in values.items() if k not in ("datasets", "overrides")}, overrides)
        if variant is not None:
            values["variant"] = values.pop("variants", {}).get(variant)
        return cls.parse(values, section)

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> Self:
        """Validate `values`; InputError names every problem by its full key, one line each."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [f"{PARAMS}: {'.'.join([where, *map(str, e['loc'])])}: {e['msg']}" for e in error.errors()]
            raise InputError("\n".join(lines)) from None

    @classmethod
    def dvc_keys(cls, section: str, dataset: str | None = None, variant: str | None = None) -> set[str]:
        """The keys that `load` reads, as dvc.yaml lists them under `params`."""
        keys = set(cls.model_fields) - {"variant"}
        if dataset is not None:
            keys.add(f"overrides.{dataset}")
        if variant is not None:
            keys.add(f"variants.{variant}")
        return {f"{section}.{key}" for key in keys}


def lookup(key: str) -> dict[str, Any]:
    """Return the mapping at dotted `key` of params.yaml; InputError says which part of the key is missing."""
    try:
        node = yaml.safe_load(PARAMS.read_text())
    except FileNotFoundError:
        raise InputError(f"{PARAMS} is missing: run from the project's top folder") from None
    except yaml.YAMLError as error:
        raise InputError(f"{PARAMS} is not valid YAML: {one_line(error)}") from None
    walked: list[str] = []
    for part in key.split("."):
        known = sorted(node) if isinstance(node, dict) else []
        if part not in known:
            raise InputError(f"{PARAMS}: {'.'.join([*walked, part])} is missing (there: {', '.join(known)})")
        node = node[part]
        walked.append(part)
    if not isinstance(node, dict):
        raise InputError(f"{PARAMS}: {key} must be a mapping, got {node!r}")
    return node


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` laid over it, mapping by mapping."""
    both = {
        k: _merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v
        for k, v in changes.items()
    }
    return base | both
