import logging
import os
import pickle
import time

import pytest
import torch
from accelerate import Accelerator
from conftest import reset_accelerate
from PIL import Image
from safetensors.torch import save_file

from sketch_perceptual.data.datasets import Images
from sketch_perceptual.data.images import to_tensor
from sketch_perceptual.errors import InputError
from sketch_perceptual.training import feature_cache
from sketch_perceptual.training.feature_cache import FeatureCache, extract_features, fill_cache


def test_features_are_found_again_by_key_in_any_order(tmp_path):
    features = torch.arange(12.0).view(4, 3)
    cache = FeatureCache(tmp_path / "cache")
    assert cache.missing(["a", "b", "a", "c"]) == [0, 1, 3]
    cache.add(["a", "b"], features[:2])
    assert cache.missing(["c", "a", "c", "d"]) == [0, 3]
    cache.add(["c", "d"], features[2:].half())
    again = FeatureCache(tmp_path / "cache")
    assert torch.equal(again.read(["d", "a", "c", "a"]), features[[3, 0, 2, 0]])
    parts = list(again.parts(["d", "a", "c", "a"]))
    assert len(parts) == 2  # a file at a time
    assert sorted(torch.cat([positions for positions, _ in parts]).tolist()) == [0, 1, 2, 3]
    assert torch.equal(pickle.loads(pickle.dumps(again)).row("c"), features[2])  # a worker that was spawned


def test_what_another_process_adds_is_seen_after_a_refresh(tmp_path):
    one, other = FeatureCache(tmp_path), FeatureCache(tmp_path)
    one.add(["a"], torch.zeros(1, 2))
    other.add(["a", "b"], torch.zeros(2, 2))
    assert one.missing(["a", "b"]) == [1]
    one.refresh()
    assert one.missing(["a", "b"]) == []
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError("No space left on device"), InputError), (KeyboardInterrupt, KeyboardInterrupt)],
)
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, error, raised):
    cache = FeatureCache(tmp_path)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(feature_cache, "save_file", fail)
    with pytest.raises(
        raised, match="`feature_dir`: .* cannot be written: No space left" if raised is InputError else None
    ):
        cache.add(["a"], torch.zeros(1, 2))
    assert list(tmp_path.iterdir()) == []
    assert cache.missing(["a"]) == [0]


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    names = ("0123456789abcdef.partial", "0123456789abcdee.partial", "theirs.partial")
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    for name in names[1:]:
        os.utime(tmp_path / name, (time.time() - 25 * 3600,) * 2)
    FeatureCache(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2]}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"`feature_dir`: .*file.* cannot be written to"):
        FeatureCache(tmp_path / "file" / "cache")


KEYS, FEATURES = ["a", "b"], torch.arange(4.0).view(2, 2) + 1


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def rewrite(path, tensors, metadata):
    save_file(tensors, path, metadata)


DAMAGE = {
    "a bit of a number": lambda path: flip(path, -2),
    "NaN": lambda path: path.write_bytes(path.read_bytes()[:-4] + b"\0\0\xc0\x7f"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "no metadata": lambda path: rewrite(path, {"features": FEATURES}, None),
    "no checksum": lambda path: rewrite(path, {"features": FEATURES}, {"keys": "a b"}),
    "another tensor": lambda path: rewrite(path, {"x": FEATURES}, {"keys": "a b", "sha256": "0"}),
    "fewer rows": lambda path: rewrite(path, {"features": FEATURES[:1]}, {"keys": "a b", "sha256": "0"}),
    "one dimension": lambda path: rewrite(path, {"features": FEATURES[0]}, {"keys": "a b", "sha256": "0"}),
}


def fill(folder, caplog):
    """A cache with FEATURES in `folder`; how many were computed, and what was said."""
    caplog.clear()
    computed = []

    def compute(images):
        computed.extend(images)
        return images.flatten(1)

    def read(position):
        return FEATURES[position].view(2, 1, 1)

    cache = FeatureCache(folder)
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    fill_cache(accelerator, cache, KEYS, read, compute, KEYS.__getitem__, batch_size=1)
    return cache, len(computed), [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def read_lost(index):
    raise InputError(f"cannot read {KEYS[index]}")


def test_an_image_lost_to_a_worker_is_named_without_a_traceback(tmp_path):
    reset_accelerate()
    with pytest.raises(InputError, match=f"^cannot read {KEYS[0]}$"):
        fill_cache(
            Accelerator(cpu=True),
            FeatureCache(tmp_path),
            KEYS,
            read_lost,
            torch.nn.Flatten(),
            KEYS.__getitem__,
            batch_size=1,
            num_workers=1,
        )


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_once_and_computed_again(tmp_path, caplog, damage):
    assert fill(tmp_path, caplog)[1:] == (2, [])
    (path,) = tmp_path.iterdir()
    DAMAGE[damage](path)
    save_file({"theirs": FEATURES}, tmp_path / "foreign.safetensors")
    cache, computed, (warning,) = fill(tmp_path, caplog)
    assert computed == 2
    assert path.name in warning
    assert "damaged" in warning
    assert torch.equal(cache.read(KEYS), FEATURES)
    assert fill(tmp_path, caplog)[1:] == (0, [])
    assert (tmp_path / "foreign.safetensors").exists()


def test_any_flipped_bit_is_seen(tmp_path):
    FeatureCache(tmp_path).add(KEYS, FEATURES)
    (path,) = tmp_path.iterdir()
    whole, seen = path.read_bytes(), 0
    for position in range(len(whole)):
        path.write_bytes(whole)
        flip(path, position)
        cache = FeatureCache(tmp_path)
        if missing := cache.missing(KEYS):
            assert missing == [0, 1]
            seen += 1
        else:  # a space of the header's padding, for one
            assert torch.equal(cache.read(KEYS), FEATURES), position
    assert seen > 0.9 * len(whole)


def test_a_file_is_verified_once(tmp_path, monkeypatch):
    FeatureCache(tmp_path).add(KEYS, FEATURES)
    verified, checksum = [], feature_cache._checksum
    monkeypatch.setattr(
        feature_cache, "_checksum", lambda keys, features: verified.append(keys) or checksum(keys, features)
    )
    cache = FeatureCache(tmp_path)
    for _ in range(3):
        assert cache.missing(["a"]) == cache.missing(KEYS) == []
        assert torch.equal(cache.row("b"), FEATURES[1])
    assert len(verified) == 1


class Mean(torch.nn.Module):
    """The mean colour, which knows nothing of the paper."""

    feature_key = "mean"
    moved = 0

    def to(self, *place, **format):
        Mean.moved += 1
        return self

    def prepare(self, image):
        return to_tensor(image.resize((32, 32)))

    def features(self, images):
        return images.mean((2, 3))


@pytest.fixture
def transparent(tmp_path):
    path = tmp_path / "transparent.png"
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(path)
    return path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_features_depend_on_the_background_and_are_computed_once(transparent, tmp_path, num_workers):
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    folder, workers = str(tmp_path / "cache"), {"num_workers": num_workers}
    for background, level in (("white", 1), ("black", -1)):
        data = Images([transparent], ["transparent"], background)
        cache = extract_features(accelerator, folder, Mean(), data, ["key"], **workers)
        assert cache.row("key").tolist() == [level] * 3
    Mean.moved = 0
    cache = extract_features(accelerator, folder, Mean(), data, ["key"])
    assert cache.row("key").tolist() == [-1] * 3
    assert Mean.moved == 0  # nothing was missing


def test_features_that_overflow_are_named(transparent, tmp_path, monkeypatch):
    monkeypatch.setattr(Mean, "features", lambda self, images: images.mean((2, 3)) * torch.inf)
    reset_accelerate()
    data = Images([transparent], ["transparent"])
    with pytest.raises(InputError, match=r"features of transparent .*not finite.*`mixed_precision`"):
        extract_features(Accelerator(cpu=True), str(tmp_path), Mean(), data, ["key"])


def test_the_default_folder_is_asked_for_only_when_it_is_needed(transparent, tmp_path, monkeypatch):
    reset_accelerate()
    accelerator, data = Accelerator(cpu=True), Images([transparent], ["transparent"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    extract_features(accelerator, None, Mean(), data, ["key"])
    assert list((tmp_path / "home" / "sketch-perceptual" / "features").iterdir())

    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.expanduser", homeless)
    with pytest.raises(InputError, match=r"no home folder .*: choose a `feature_dir`"):
        extract_features(accelerator, None, Mean(), data, ["key"])
    extract_features(accelerator, str(tmp_path / "given"), Mean(), data, ["key"])
