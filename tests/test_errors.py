import argparse

import pytest

from sketch_perceptual.errors import InputError, check_choice, first_line, first_names, in_options, printable, program


def test_arguments_become_options_where_the_script_has_them():
    args = argparse.Namespace(fit="crop")
    message = "`fit` must be pad, `share` below 1; use `hf auth login`"
    assert in_options(message, args) == "--fit must be pad, `share` below 1; use `hf auth login`"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand a tab, é 猫", "two\nlines\tand a tab, é 猫"),
        ("\x1b]0;title\x07\x1b[2J\r\x9b.png", r"\x1b]0;title\x07\x1b[2J\r\x9b.png"),
        ("fox\u202egnp.exe", r"fox\u202egnp.exe"),
        ("GET https://x.example/a/b?X-Signature=secret&y=1 fails", "GET https://x.example/a/b?... fails"),
    ],
)
def test_what_is_printed_has_no_control_characters_and_no_signatures(text, shown):
    assert printable(text) == shown


def test_a_choice_is_one_of_them():
    check_choice("fit", "pad", ("crop", "pad"))
    with pytest.raises(InputError, match=r"^`fit` must be one of crop, pad, got 'fill'"):
        check_choice("fit", "fill", ("crop", "pad"))


def test_long_lists_and_errors_are_cut():
    assert first_names(["a", "b"]) == "a, b"
    assert first_names(list("abcdefghijkl"), "\n", 2) == "a\nb\nand 10 more"
    assert first_line(ValueError(" one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("train_johnson.py", "train_johnson.py"),
        ("/home/x/site-packages/train_johnson.py", "train_johnson.py"),
        ("/home/x/sketch_perceptual/evaluation/__main__.py", "evaluation"),
        ("/home/x/bin/sketch-perceptual", "sketch-perceptual"),
    ],
)
def test_a_program_has_one_name_however_it_was_started(monkeypatch, file, name):
    monkeypatch.setattr("sys.argv", [file, "--seed", "1"])
    assert program() == name
