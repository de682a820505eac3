import pytest

from sketch_perceptual.data.tags import shuffled, with_trigger
from sketch_perceptual.seeds import generator

# caption, trigger -> caption
TRIGGERS = [
    ("a fox", "inkline", "inkline, a fox"),
    ("a fox", None, "a fox"),
    ("a fox", "", "a fox"),
    ("an Inkline fox", "inkline", "an Inkline fox"),
    ("inkliner, a fox", "inkline", "inkline, inkliner, a fox"),
    ("a fox (sks)", "sks", "a fox (sks)"),
    ("c++ code", "c++", "c++ code"),
    ("cxx code", "c++", "c++, cxx code"),
]


@pytest.mark.parametrize("caption, trigger, expected", TRIGGERS)
def test_a_trigger_stands_before_captions_without_it(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected


def test_shuffled_tags_are_all_there_and_the_first_stay():
    found = {shuffled("a, b,c ,d", 1, generator(n)) for n in range(100)}
    assert found == {f"a, {rest}" for rest in ("b, c, d", "b, d, c", "c, b, d", "c, d, b", "d, b, c", "d, c, b")}
    assert len({shuffled("a, b, c", 0, generator(n)) for n in range(100)}) == 6
    assert shuffled("a, b", 5, generator(0)) == "a, b"
    assert shuffled("a fox", 0, generator(0)) == "a fox"
