import pytest
from PIL import Image

from sketch_perceptual.measures.ink import chroma, ink, is_black


def test_colour_ink_and_blackness():
    picture = Image.new("RGB", (10, 10), "white")
    assert (chroma(picture), ink(picture), is_black(picture)) == (0, 0, False)
    picture.paste("black", (0, 0, 10, 2))
    picture.paste((255, 55, 155), (0, 5, 5, 10))
    assert chroma(picture) == pytest.approx(0.25 * 200 / 255)
    assert ink(picture) == pytest.approx(0.2 + 0.25)  # luma 126
    assert is_black(Image.new("L", (3, 3)))
    assert not is_black(Image.new("RGB", (3, 3), (0, 1, 0)))
