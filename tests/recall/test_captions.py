"""Every key that summaries have reads as words."""

from stages.recall.captions import CAPTIONS, caption
from stages.recall.classify_masked import METHODS
from stages.recall.decoders import REPRESENTATIONS


def test_keys_are_identifiers_and_captions_are_words():
    keys = [*CAPTIONS, *METHODS, *REPRESENTATIONS]
    assert all(key.isidentifier() for key in keys)
    assert not any("_" in caption(key) for key in keys)
    assert len(set(CAPTIONS.values())) == len(CAPTIONS)
    assert caption("from_scratch") == "from scratch"
    assert caption("pixel_weight_0.5") == "pixel weight 0.5"
    assert caption("components_16") == "16 components"
