import io
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sketch_perceptual.data.images import load_image
from sketch_perceptual.data.splits import content_key, find_copies, split, thumbnail
from sketch_perceptual.errors import InputError


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
    return partition(find_copies([content_key(i) for i in images], np.stack([thumbnail(i) for i in images])))


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
    assert partition(find_copies(["a", "b", "b"], chain[[0, 2, 2]])) == {frozenset({1, 2})}
    for keys in itertools.permutations("abcd"):
        thumbnails = np.concatenate([chain, noise(2, seed=1), chain[3:]])
        assert partition(find_copies([*keys, "e", "0", keys[3]], thumbnails)) == {frozenset({0, 1, 2, 3, 6})}


def test_copies_are_found_far_apart_in_large_data():
    thumbnails = noise(1200)
    pairs = ((0, 1199), (511, 512), (700, 701), (20, 30))
    for one, other in pairs:
        thumbnails[other] = np.rot90(thumbnails[one])
    keys = [f"{index:016x}" for index in range(1200)]
    assert partition(find_copies(keys, thumbnails)) == {frozenset(pair) for pair in pairs}


def divide(labels, pictures, groups=None, share=0.1, turn=1):
    """A split of pictures such as "12a": "12b" is a copy of it in another file, "12a" again is an equal file."""
    return split(labels, pictures, np.array([turn * int(picture[:-1]) for picture in pictures]), groups, share)


def unlike(*numbers):
    return [f"{number}a" for number in numbers]


PICTURES = [*unlike(*range(9)), "0b", "1b", "1c", "2b"]
rows = st.tuples(st.integers(0, 3), st.sampled_from(PICTURES), st.sampled_from("abcde"))
data_sets = st.lists(rows, min_size=10, max_size=40)
shares = st.sampled_from([0.1, 0.3, 0.6])


@settings(deadline=None, max_examples=60)
@given(data_sets, st.booleans(), shares, st.randoms(use_true_random=False))
def test_order_and_numbers_of_copies_change_nothing(rows, grouped, share, random):
    def outcome(rows, turn):
        labels, pictures, groups = zip(*rows, strict=True)
        try:
            result = divide(labels, pictures, groups if grouped else None, share, turn)
        except InputError as error:
            return str(error)
        lists = result.train, result.validation, result.left_out
        return [sorted(rows[index] for index in side) for side in lists], result.summary

    assert outcome(random.sample(rows, len(rows)), turn=-1) == outcome(rows, turn=1)


@settings(deadline=None, max_examples=100)
@given(data_sets, st.booleans(), shares)
def test_no_picture_copy_or_group_is_on_both_sides_and_the_numbers_are_those_of_the_lists(rows, grouped, share):
    labels, pictures, groups = zip(*rows, strict=True)
    try:
        result = divide(labels, pictures, groups if grouped else None, share)
    except InputError:
        assume(False)
    lists = result.train, result.validation, result.left_out
    assert all(side == sorted(side) for side in lists)
    assert sorted(itertools.chain(*lists)) == list(range(len(rows)))
    units = [int(picture[:-1]) for picture in pictures]
    train, validation, left_out = ({units[index] for index in side} for side in lists)
    assert not train & validation and left_out <= validation
    assert grouped or not left_out
    if grouped:
        outside = {groups[index] for index in result.train + result.left_out}
        assert not outside & {groups[index] for index in result.validation}

    trained, validated, without = ({labels[index] for index in side} for side in lists)
    assert trained | without == set(labels)
    classes = {unit: {row[0] for row in zip(labels, units, strict=True) if row[1] == unit} for unit in units}
    alone = {label for label in labels if {label} in classes.values()}
    assert grouped or {label for label in alone if sum(label in c for c in classes.values()) > 1} <= validated

    copied = {unit: count for unit, count in Counter(units).items() if count > 1}
    copies = [sum(copied.values()), len(copied)]
    lacking = [len(set(labels) - validated), len(set(labels) - trained)]
    assert [result.copied, result.copy_groups, result.unvalidated, result.untrained] == copies + lacking
    said = [len(result.train), len(result.validation)]
    said += [*copies, sum(len(classes[unit]) > 1 for unit in copied)] if copied else []
    said += [number for number in (len(result.left_out), *lacking) if number]
    assert list(map(int, re.findall(r"\d+", result.summary))) == said


@pytest.mark.parametrize("size, held_out", {1: 0, 2: 1, 3: 1, 14: 1, 16: 2, 50: 5, 51: 5, 100: 10}.items())
@pytest.mark.parametrize("grouped", [False, True])
def test_every_class_gives_a_tenth_and_at_least_one_of_several(size, held_out, grouped):
    labels = [0] * 50 + [1] * 51 + [2] * size + [3] * 2
    pictures = unlike(*range(len(labels)))
    result = divide(labels, pictures, pictures if grouped else None)
    assert Counter(labels[index] for index in result.validation) == Counter({0: 5, 1: 5, 2: held_out, 3: 1})
    assert ("classes without a validation image: 1" in result.summary) == (result.unvalidated == 1) == (size == 1)


@pytest.mark.parametrize("first", range(6))  # whichever place its hash gives it
def test_many_copies_of_one_picture_are_validated_only_if_there_is_no_other(first):
    result = divide([0] * 60, unlike(*[first] * 20, *range(100, 140)))
    assert len(result.validation) == 6 and min(result.validation) >= 20
    assert divide([0] * 50, unlike(*[first] * 30, *[9] * 20)).validation == list(range(30, 50))


FOUR, APART, ALIKE = [0, 0, 1, 1], unlike(1, 2, 3, 4), ["7a", "7b", "7c", "7a"]


@pytest.mark.parametrize(
    "labels, pictures, groups, share, sentence",
    [
        *((FOUR, APART, None, s, f"--validation_share must be .* got {s}") for s in (0, 1, -0.1, 10, float("nan"))),
        ([], [], None, 0.1, "--validation_share: there are no images"),
        ([], [], [], 0.1, "--validation_share: there are no images"),
        (FOUR, ALIKE, None, 0.1, "--validation_share: all images are copies"),
        ([0, 1, 2, 3], APART, None, 0.1, "--validation_share: one side stays empty"),
        (FOUR, APART, ["x"] * 4, 0.1, "--group_column: all images are of the group 'x'"),
        (FOUR, APART, ["x", "", "y", None], 0.1, "--group_column: 2 of 4 images have no group"),
        (FOUR, APART, ["x", "x", "y", "y"], 0.1, "--group_column: one side stays empty"),
        (FOUR, ALIKE, ["x", "y", "x", "y"], 0.1, "--group_column: one side stays empty"),
    ],
)
def test_what_cannot_be_split_is_answered_with_the_option(labels, pictures, groups, share, sentence):
    with pytest.raises(InputError, match=f"^{sentence}"):
        divide(labels, pictures, groups, share)
