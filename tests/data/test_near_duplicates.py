import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sketch_perceptual.data.images import load_image
from sketch_perceptual.data.near_duplicates import content_key, near_duplicates, thumbnail


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def drawing(seed, size=(256, 192)):
    image = Image.new("RGB", size, "white")
    points = np.random.default_rng(seed).random((4, 4, 2)) * size
    for line in points.tolist():
        ImageDraw.Draw(image).line([tuple(point) for point in line], "black", 3)
    return image


def jpeg(image, quality=50):
    return load_image(saved(image, "JPEG", quality=quality))


def partition(copies):
    """The same for any naming of the groups."""
    groups = [frozenset(np.flatnonzero(copies == group).tolist()) for group in set(copies.tolist())]
    return {group for group in groups if len(group) > 1}


def copies_among(images):
    return partition(near_duplicates([content_key(i) for i in images], np.stack([thumbnail(i) for i in images])))


def test_a_key_is_the_pixels_whatever_the_file():
    image = drawing(0)
    files = saved(image), saved(image, compress_level=0), saved(image, "TIFF"), saved(image, "WEBP", lossless=True)
    files += (saved(image.convert("RGBA")), saved(image.convert("1")))
    assert {content_key(load_image(file)) for file in files} == {content_key(image)}


def test_a_key_differs_by_one_pixel_and_by_the_size_alone():
    other = drawing(0)
    other.putpixel((5, 5), (254, 255, 255))
    turned = drawing(0).transpose(Image.Transpose.ROTATE_180)
    papers = [Image.new("RGB", size, "white") for size in ((6, 4), (4, 6), (8, 3))]
    assert len({content_key(image) for image in (drawing(0), other, turned, *papers)}) == 6


SAME = {
    "exact": lambda image: image.copy(),
    **{turn.name: lambda image, turn=turn: image.transpose(turn) for turn in Image.Transpose},
    "larger": lambda image: image.resize((600, 450)),
    "smaller": lambda image: image.resize((90, 68), Image.Resampling.LANCZOS),
    "JPEG": jpeg,
    "all of it": lambda image: jpeg(jpeg(image).resize((150, 112)).transpose(Image.Transpose.TRANSVERSE)),
}


@pytest.mark.parametrize("change", SAME)
def test_a_copy_is_found_among_other_drawings(change):
    originals = [drawing(seed) for seed in range(6)]
    images = originals + [SAME[change](image) for image in originals]
    assert copies_among(images) == {frozenset({seed, seed + 6}) for seed in range(6)}


def test_drawings_that_differ_stay_apart():
    moved, more, negative = (drawing(0) for _ in range(3))
    moved = moved.transform(moved.size, Image.Transform.AFFINE, (1, 0, 9, 0, 1, 0), fillcolor="white")
    ImageDraw.Draw(more).line((20, 150, 220, 40), "black", 3)
    negative = Image.eval(negative, lambda level: 255 - level)
    assert copies_among([*map(drawing, range(40)), moved, more, negative]) == set()


def test_blank_pages_are_copies_only_if_equal():
    papers = [Image.new("RGB", size, ink) for ink in ("white", "black") for size in ((40, 30), (40, 30), (30, 40))]
    faint = Image.blend(drawing(1), Image.new("RGB", (256, 192), "white"), 0.99)
    papers += [faint, faint.transpose(Image.Transpose.FLIP_TOP_BOTTOM), faint.copy()]
    assert copies_among([*papers, drawing(0)]) == {frozenset(pair) for pair in ((0, 1), (3, 4), (6, 8))}
    assert copies_among(papers[:5]) == {frozenset(pair) for pair in ((0, 1), (3, 4))}


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32)).astype(np.uint8)


def test_copies_of_copies_are_one_group_in_any_order():
    # Neighbours correlate 0.9962, the others at most 0.985.
    one, two = np.linalg.qr((noise(2) - 127.5).reshape(2, -1).T)[0].T.reshape(2, 32, 32)
    angles = np.radians([0, 5, 10, 15])[:, None, None]
    chain = (127.5 + 1000 * (np.cos(angles) * one + np.sin(angles) * two)).round().astype(np.uint8)
    assert partition(near_duplicates(["a", "b", "b"], chain[[0, 2, 2]])) == {frozenset({1, 2})}
    for keys in itertools.permutations("abcd"):
        thumbnails = np.concatenate([chain, noise(2, seed=1), chain[3:]])
        assert partition(near_duplicates([*keys, "e", "0", keys[3]], thumbnails)) == {frozenset({0, 1, 2, 3, 6})}


def test_copies_are_found_far_apart_in_large_data():
    thumbnails = noise(1200)
    pairs = ((0, 1199), (511, 512), (700, 701), (20, 30))
    for one, other in pairs:
        thumbnails[other] = np.rot90(thumbnails[one])
    keys = [f"{index:016x}" for index in range(1200)]
    assert partition(near_duplicates(keys, thumbnails)) == {frozenset(pair) for pair in pairs}
