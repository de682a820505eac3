import pytest
from PIL import Image

from sketch_perceptual.data.datasets import LabelledImages
from sketch_perceptual.data.near_duplicates import content_key
from sketch_perceptual.data.scan import read_once
from sketch_perceptual.errors import InputError, TooLittleMemory


@pytest.fixture
def data(tmp_path):
    """A drawing, a damaged file, another drawing, and the first one turned."""
    first = Image.new("RGB", (20, 10), "white")
    first.paste("black", (0, 0, 7, 3))
    second = Image.new("RGB", (20, 10), "white")
    second.paste("black", (9, 0, 11, 10))
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, image in zip(paths, (first, first, second, first.rotate(180)), strict=True):
        image.save(path)
    paths[1].write_bytes(b"damaged")
    return LabelledImages(paths, list(map(str, paths)), [0, 0, 1, 1], ["a", "b"])


def test_positions_keys_and_copies_are_of_what_can_be_read(data):
    visited = []
    positions, keys, sizes, copies = read_once(data, "skip", lambda index, image: visited.append((index, image.size)))
    assert positions == [0, 2, 3]
    assert (sizes, copies) == ([(20, 10)] * 3, [])
    assert sorted(visited) == [(index, (20, 10)) for index in positions]
    assert keys == [content_key(image) for image in map(data.select(positions).image, range(3))]
    again = read_once(data, "skip", copies=True)
    assert again[:3] == (positions, keys, sizes)
    copies = again.copies
    assert copies[0] == copies[2] != copies[1]
    # positions are those of the data at hand, not rows of what it was chosen from
    assert read_once(data.select([3, 1, 2]), "skip").positions == [0, 2]


def test_a_damaged_image_is_named_unless_it_is_skipped(data):
    with pytest.raises(InputError, match=r"1 of 4 images cannot be read\.\n.*1\.png"):
        read_once(data, "error")


@pytest.mark.parametrize("wrapped", [True, False])
def test_too_little_memory_is_not_a_bad_image(data, monkeypatch, wrapped):
    """Whether the reader says so itself or in words for the user."""

    def fail(self, index):
        if wrapped:
            raise TooLittleMemory("there is not enough memory")
        raise MemoryError

    monkeypatch.setattr(LabelledImages, "image", fail)
    with pytest.raises(InputError, match=r"memory to read .*png") as error:
        read_once(data, "skip")
    assert error.value.__cause__ is not None
