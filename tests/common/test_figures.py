"""Pictures have the same bytes for the same numbers, are as sharp as they say, and show no empty boxes for letters."""

from matplotlib import pyplot as plt

from stages.common.figures import SHARPNESS, legible, save_plot
from stages.report.build_report import shown_width


def test_names_that_the_font_lacks_become_numbers():
    assert legible(["cat", "猫", "épée", "犬 dog"]) == ["cat", "class 1", "épée", "class 3"]


def test_a_page_shows_a_picture_smaller_than_it_is(tmp_path):
    for name in "ab":
        figure, ax = plt.subplots(figsize=(3, 2))
        ax.plot([0, 1], [0, 1])
        save_plot(tmp_path / f"{name}.png", figure)
    for path in (lambda name: tmp_path / f"{name}.png", lambda name: tmp_path / "vector" / f"{name}.svg"):
        assert path("a").read_bytes() == path("b").read_bytes()
    pixels = plt.imread(tmp_path / "a.png").shape[1]
    assert abs(shown_width(tmp_path / "a.png") - pixels / SHARPNESS) <= 1
