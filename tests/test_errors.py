import argparse

import pytest
import torch

from sketch_perceptual.errors import (
    InputError,
    TooLittleMemory,
    all_troubles,
    check_choice,
    complain,
    first_line,
    first_names,
    has_complained,
    in_options,
    printable,
    program,
    shown,
)


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
    assert first_names(["a\nb", "\x1b[31mc"]) == "a\\nb, \\x1b[31mc"
    assert first_line(ValueError(" one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"


NAMES = {
    "two\nlines\r\t": r"two\nlines\r\t",
    "\x1b[31mred\x07\x7f\x9b": r"\x1b[31mred\x07\x7f\x9b",
    "turned \u202egnp.exe": r"turned \u202egnp.exe",
    "\u2028": r"\u2028",
    "早い\u3000絵 \u200d é.png": "早い\u3000絵 \u200d é.png",
    r"C:\new": r"C:\new",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_on_one_line(name):
    assert shown(name) == shown(shown(name)) == NAMES[name]


# what is wrong, one after the other, and whether the last ends the work -> the message
TROUBLES = {
    "one": (["a"], False, "a"),
    "one that ends it": (["a"], True, "a"),
    "several": (["a", "b\nc"], False, "2 things are wrong:\n1. a\n2. b\nc"),
    "several and an end": (["a", "b", "a"], True, "2 things are wrong:\n1. a\n2. b"),
}


@pytest.mark.parametrize("case", TROUBLES)
def test_all_troubles_are_in_one_error(case):
    troubles, ends, message = TROUBLES[case]
    with pytest.raises(InputError) as error, all_troubles():
        assert not has_complained()
        for trouble in troubles[: len(troubles) - ends]:
            complain(trouble)
        if ends:
            raise InputError(troubles[-1])
        assert has_complained()
    assert str(error.value) == message and not has_complained()


def test_without_all_troubles_the_first_is_the_error():
    with all_troubles():
        pass
    with pytest.raises(InputError, match=r"^a$"):
        complain("a")


class Lost(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("no such file")
        except OSError as error:
            raise self.kind("cannot read 1.png:\nsketch: InputError: no such file") from error


@pytest.mark.parametrize("kind", [InputError, TooLittleMemory])
def test_an_error_in_a_worker_arrives_without_its_traceback(kind):
    with pytest.raises(kind) as error:
        list(torch.utils.data.DataLoader(Lost(kind), num_workers=1))
    assert str(error.value) == "cannot read 1.png:\nsketch: InputError: no such file"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("train_johnson.py", "train_johnson.py"),
        ("/home/x/site-packages/train_johnson.py", "train_johnson.py"),
        ("/home/x/bin/sketch-perceptual", "sketch-perceptual"),
    ],
)
def test_a_program_has_one_name_however_it_was_started(monkeypatch, file, name):
    monkeypatch.setattr("sys.argv", [file, "--seed", "1"])
    assert program() == name
