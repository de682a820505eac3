import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sketch_perceptual.data.splits import describe_split, split, split_hash
from sketch_perceptual.errors import InputError


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
    outside = {groups[index] for index in result.train + result.left_out} if grouped else left_out
    assert not outside & {groups[index] for index in result.validation}

    trained, validated, without = ({labels[index] for index in side} for side in lists)
    assert trained | without == set(labels)
    classes = {unit: {row[0] for row in zip(labels, units, strict=True) if row[1] == unit} for unit in units}
    alone = {label for label in labels if {label} in classes.values()} if not grouped else set()
    assert {label for label in alone if sum(label in c for c in classes.values()) > 1} <= validated

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
    assert ("classes without a held-out image: 1" in result.summary) == (result.unvalidated == 1) == (size == 1)


@pytest.mark.parametrize("first", range(6))  # whichever place its hash gives it
def test_many_copies_of_one_picture_are_validated_only_if_there_is_no_other(first):
    result = divide([0] * 60, unlike(*[first] * 20, *range(100, 140)))
    assert len(result.validation) == 6 and min(result.validation) >= 20
    assert divide([0] * 50, unlike(*[first] * 30, *[9] * 20)).validation == list(range(30, 50))


FOUR, APART, ALIKE = [0, 0, 1, 1], unlike(1, 2, 3, 4), ["7a", "7b", "7c", "7a"]


@pytest.mark.parametrize(
    "labels, pictures, groups, share, sentence",
    [
        *((FOUR, APART, None, s, f"`validation_share` must be .* got {s}") for s in (0, 1, -0.1, 10, float("nan"))),
        ([], [], None, 0.1, "there are no images"),
        ([], [], [], 0.1, "there are no images"),
        (FOUR, ALIKE, None, 0.1, "all images are copies"),
        ([0, 1, 2, 3], APART, None, 0.1, "`validation_share`: one side"),
        (FOUR, APART, ["x"] * 4, 0.1, "`group_column`: all images .* group 'x'"),
        (FOUR, APART, ["x", "", "y", None], 0.1, "`group_column`: 2 of 4 images have no group"),
        (FOUR, APART, ["x", "x", "y", "y"], 0.1, "`group_column`: one side"),
        (FOUR, ALIKE, ["x", "y", "x", "y"], 0.1, "`group_column`: one side"),
    ],
)
def test_what_cannot_be_split_is_answered_with_the_option(labels, pictures, groups, share, sentence):
    with pytest.raises(InputError, match=f"^{sentence}"):
        divide(labels, pictures, groups, share)


def test_a_split_is_described_by_its_held_out_images_whatever_their_order():
    labels, keys = [0, 0, 0, 1, 1, 1], [f"k{index}" for index in range(6)]
    result = split(labels, keys, range(6), validation_share=0.3)
    record = describe_split(result, keys, 0.3, None)
    assert record["validation"] == sorted(keys[index] for index in result.validation)
    assert (record["train_images"], record["validation_images"], record["validation_share"]) == (4, 2, 0.3)
    order = [3, 5, 0, 1, 4, 2]
    turned = [keys[index] for index in order]
    again = split([labels[index] for index in order], turned, range(6), validation_share=0.3)
    assert split_hash(describe_split(again, turned, 0.3)) == split_hash(record)
    assert split_hash(record | {"validation": keys[:2]}) != split_hash(record | {"validation": keys[1:3]})
