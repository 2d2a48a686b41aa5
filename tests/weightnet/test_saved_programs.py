"""Programs come back from JSON as they were, and networks run by what came back."""

import json

import pytest
import torch
from weightnet.classifiers import CLASSIFIERS
from weightnet.modern import MODERN

from stages.common.stage import InputError
from stages.weightnet.tracing.program import float_state, run_stack, trace
from stages.weightnet.tracing.saved import from_plain, to_plain


@pytest.mark.parametrize("name", [*CLASSIFIERS, *MODERN])
def test_a_program_is_the_same_after_json(name):
    torch.manual_seed(0)
    model = (CLASSIFIERS | MODERN)[name]()
    program = trace(model, (3, 16, 16))
    again = from_plain(json.loads(json.dumps(to_plain(program), allow_nan=False)))
    assert again == program and list(again.layout.shapes) == list(program.layout.shapes)
    weights = {key: float_state(model)[key][None] for key in program.layout.shapes}
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(run_stack(program, weights, images), run_stack(again, weights, images))


@pytest.mark.parametrize(
    "change", [{"steps": 3}, {"steps": [[1, 2]]}, {"layout": None}, {"steps": [["magic", "a", [], [], {}, {}]]}]
)
def test_what_is_no_program_is_refused(change):
    plain = to_plain(trace(next(iter(CLASSIFIERS.values()))(), (3, 16, 16)))
    with pytest.raises(InputError, match="make it again"):
        from_plain(plain | change)
