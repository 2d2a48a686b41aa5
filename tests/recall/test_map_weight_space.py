"""What the stage asks of fleets and rules."""

import numpy as np
import pytest
from known_fleets import TABLES

from stages.recall.map_weight_space import attribute_effects


def test_an_attribute_s_effect_is_how_much_oftener_the_answer_is_yes_where_it_is():
    effects = attribute_effects(TABLES)
    assert list(effects) == ["cross", "blue", "right"]
    cells = np.arange(8)
    for bit, effect in enumerate(effects.values()):
        has = (cells >> bit & 1) == 1
        assert effect == pytest.approx(TABLES[:, has].mean(1) - TABLES[:, ~has].mean(1))
