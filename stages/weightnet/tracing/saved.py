"""A program as plain values, so that networks on disk bring their steps along and nobody's code is run to read them.

JSON has no tuples, slices or infinities: each is a mapping with one key that says what it is.
"""

import math
from dataclasses import fields
from typing import Any

from stages.common.files import Metadata
from stages.common.stage import InputError
from stages.common.vectors import Layout
from stages.weightnet.tracing.operations import POINTWISE, RUN, Step
from stages.weightnet.tracing.program import Program


def to_plain(program: Program) -> Metadata:
    """Return a program as values that JSON keeps: `from_plain` makes the same of them."""
    steps = [[_plain(getattr(step, part.name)) for part in fields(Step)] for step in program.steps]
    return {
        "steps": steps,
        **program.layout.metadata,
        "unused": list(program.unused),
        "notes": list(program.notes),
        "whole": [[name, values] for name, values in program.whole.items()],
    }


def from_plain(value: Metadata) -> Program:
    """Return the program that `to_plain` gave; InputError if it is none, or of a version with other steps."""
    try:
        steps = tuple(Step(*(_value(part) for part in step)) for step in value["steps"])
        own = {key: tuple(value[key]) for key in ("unused", "notes")}
        program = Program(steps, Layout.from_metadata(value), own["unused"], own["notes"], dict(value["whole"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"it holds no steps of a network ({type(error).__name__}): make it again") from None
    if unknown := [step.kind for step in steps if step.kind not in {"input", *RUN, *POINTWISE}]:
        raise InputError(f"it holds a step {unknown[0]}, which this version does not know: make it again")
    return program


def _plain(value: object) -> object:
    match value:
        case tuple():
            return {"tuple": [_plain(item) for item in value]}
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {"mapping": [[key, _plain(item)] for key, item in value.items()]}
        case slice():
            return {"slice": [value.start, value.stop, value.step]}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case None | bool() | int() | float() | str():
            return value
    if value is ...:
        return {"ellipsis": None}
    raise InputError(f"a step with an option of type {type(value).__name__} cannot be saved")


def _value(value: object) -> Any:
    match value:
        case list():
            return [_value(item) for item in value]
        case {"tuple": items}:
            return tuple(_value(item) for item in items)
        case {"mapping": pairs}:
            return {key: _value(item) for key, item in pairs}
        case {"slice": ends}:
            return slice(*ends)
        case {"float": text}:
            return float(text)
        case {"ellipsis": None}:
            return ...
    return value
