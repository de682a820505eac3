import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sketch_perceptual.errors import InputError
from sketch_perceptual.lora.prompts import cycle_prompts, missing_pictures, open_folder, read_prompts


def test_prompts_come_again_with_a_number():
    assert cycle_prompts(["a", "b", "a"], 5) == [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1)]
    assert cycle_prompts(["a", "b", "a"], 2) == [("a", 0), ("b", 0)]


@given(st.lists(st.text(), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 12))
def test_any_prompts_come_back_from_the_folder(prompts, count, more):
    """Each its own noise; and a longer list goes on where a shorter one ended."""
    cycled = cycle_prompts(prompts, count + more)
    assert [prompt for prompt, _ in cycled] == [prompts[index % len(prompts)] for index in range(count + more)]
    assert len(set(cycled)) == count + more
    with tempfile.TemporaryDirectory() as folder:
        assert open_folder(Path(folder), cycled[:count], {}) == open_folder(Path(folder), cycled, {})[:count]
        lines = Path(folder, "metadata.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == [prompt for prompt, _ in cycled]


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa fox\n\n  ein Fuchs für Ümit \n", encoding="utf-8")
    assert read_prompts(path) == ["a fox", "ein Fuchs für Ümit"]
    for damage in (b" \n", b"\xff\xfe\x00"):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"`prompts` .*prompts\.txt"):
            read_prompts(path)
    with pytest.raises(InputError, match=r"`prompts` nowhere\.txt cannot be read"):
        read_prompts("nowhere.txt")


def test_a_folder_says_what_it_holds_and_refuses_what_it_does_not(tmp_path):
    folder = tmp_path / "new" / "lora"
    paths = open_folder(folder, cycle_prompts(["ä", "b"], 3), {"seed": 1})
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
    assert open_folder(folder, cycle_prompts(["ä", "b"], 2), {"seed": 1}) == paths[:2]
    assert len(open_folder(folder, cycle_prompts(["ä", "b"], 5), {"seed": 1})) == 5
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["ä", "b", "ä", "b", "ä"]
    with pytest.raises(InputError, match=r"lora .*seed=1.* 2.*`output_dir`"):
        open_folder(folder, cycle_prompts(["ä", "b"], 3), {"seed": 2})
    with pytest.raises(InputError, match=r"lora .*'b'.*'c'.*`output_dir`"):
        open_folder(folder, cycle_prompts(["ä", "c"], 3), {"seed": 1})
    (folder / ".settings.json").write_text("{")
    with pytest.raises(InputError, match=r"settings\.json is not JSON"):
        open_folder(folder, cycle_prompts(["ä", "b"], 3), {"seed": 1})


LINE = '{"file_name": "00000.png", "text": "a"}'


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("metadata.jsonl", LINE[:30], r"metadata\.jsonl line 1 is damaged"),
        ("metadata.jsonl", LINE + '\n{"text": "b"}', r"line 2 is damaged \(no 'file_name'"),
        ("metadata.jsonl", LINE.replace("0.png", "1.png"), r"line 1 .*expected the prompt of 00000\.png"),
        ("metadata.jsonl", "[1]", r"metadata\.jsonl line 1 is damaged"),
        (".settings.json", "[1]", r"settings\.json "),
        (".settings.json", "[" * 100_000, r"settings\.json is not JSON"),
    ],
)
def test_a_damaged_folder_is_a_sentence(tmp_path, name, text, sentence):
    open_folder(tmp_path, cycle_prompts(["a", "b"], 3), {"seed": 1})
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=sentence + ".*`output_dir`"):
        open_folder(tmp_path, cycle_prompts(["a", "b"], 3), {"seed": 1})


def test_damaged_pictures_and_those_of_another_size_are_missing(tmp_path):
    paths = open_folder(tmp_path, cycle_prompts(["a"], 5), {})
    for path in paths[:3]:
        Image.effect_noise((32, 32), 50).save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    paths[2].write_bytes(b"")
    Image.new("RGB", (16, 32)).save(paths[3])
    assert missing_pictures(paths, 32) == [1, 2, 3, 4]
    paths[4].mkdir()
    with pytest.raises(InputError, match=r"00004\.png is a folder.*`output_dir`"):
        missing_pictures(paths, 32)
