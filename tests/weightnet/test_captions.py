"""What is added to the zoo or the predictors is shown before anybody wrote a caption for it."""

import pytest

from stages.weightnet import captions


@pytest.mark.parametrize("label", [captions.property_label, captions.predictor])
def test_what_has_no_caption_is_shown_by_its_words(label):
    assert label("mean_confidence") == "mean confidence"
    assert label("test_acc") != label("test_loss")
