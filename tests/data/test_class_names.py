import re

import pytest

from sketch_perceptual.data.class_names import (
    are_imagenets,
    class_names,
    find_classes,
    imagenet_classes,
    readable_class,
)

CRANES = ["n02012849", "n03126707"]


IDS = list(imagenet_classes())


LISTS = list(imagenet_classes().values())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("tench, Tinca tinca", "tench"),
        ("hot_dog", "hot dog"),
        ("t-shirt", "t-shirt"),
        ("jack-o'-lantern", "jack-o'-lantern"),
        ('"quoted"', '"quoted"'),
        ("  spaced  ", "spaced"),
        ("n01440764", "tench"),
        ("n00000000", "n00000000"),
        ("château", "château"),
        ("椅子", "椅子"),
        ("_", "_"),
    ],
)
def test_readable_class(name, expected):
    assert readable_class(name) == expected


def test_imagenet_has_a_thousand_ids_in_order_and_names_that_differ():
    assert len(IDS) == 1000 and sorted(IDS) == IDS and all(re.fullmatch(r"n\d{8}", id) for id in IDS)
    assert [index for index, words in enumerate(LISTS) if words == "crane"] == [134, 517]
    assert len(set(class_names(IDS))) == 1000


def swapped(names, one, other):
    place = {names.index(one): other, names.index(other): one}
    return [place.get(index, name) for index, name in enumerate(names)]


IMAGENETS = {
    "ids": (IDS, True),
    "lists of words": (LISTS, True),
    "lists with underscores": ([words.replace(" ", "_") for words in LISTS], True),
    "two ids swapped": (swapped(IDS, IDS[0], IDS[999]), False),
    "two lists swapped": (swapped(LISTS, LISTS[3], LISTS[4]), False),
    "cranes swapped": (swapped(IDS, *CRANES), False),
    "maillots swapped": (swapped(LISTS, "maillot", "maillot, tank suit"), False),
    "sorted words": (sorted(LISTS), False),
    "one too few": (IDS[:-1], False),
    "one too many": ([*IDS, "n99999999"], False),
}


@pytest.mark.parametrize("case", IMAGENETS)
def test_the_classes_of_imagenet_are_known_in_their_order_only(case):
    classes, expected = IMAGENETS[case]
    assert are_imagenets(classes) == expected


def test_the_class_in_a_prompt_is_the_longest_that_is_named():
    classes = ["dog", "hot_dog", "n02012849", "n03126707", "tee-shirt"]  # the third and fourth are both cranes
    prompts = ["A sketch of a Hot Dog", "a doge", "a dog and a hot dog", "two cranes", "a crane", "a tee-shirt."]
    assert list(find_classes(prompts, classes)) == [{1}, set(), {1}, set(), {2, 3}, {4}]
