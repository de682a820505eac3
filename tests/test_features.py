import pytest
import torch
from safetensors.torch import load_file

from sketch_perceptual.errors import InputError
from sketch_perceptual.running.feature_cache import FeatureCache


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


def test_what_another_process_adds_is_seen_after_a_refresh(tmp_path):
    one, other = FeatureCache(tmp_path), FeatureCache(tmp_path)
    one.add(["a"], torch.zeros(1, 2))
    other.add(["a", "b"], torch.zeros(2, 2))
    assert one.missing(["a", "b"]) == [1]
    one.refresh()
    assert one.missing(["a", "b"]) == []
    assert len(list(tmp_path.iterdir())) == 2


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("sketch_perceptual.running.feature_cache.save_file", full)
    with pytest.raises(InputError, match=r"--feature_dir: .* cannot be written: No space left"):
        cache.add(["a"], torch.zeros(1, 2))
    assert list(tmp_path.iterdir()) == []
    assert cache.missing(["a"]) == [0]


def test_a_half_written_file_is_ignored_and_a_damaged_one_is_named(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.add(["a"], torch.ones(1, 2))
    (tmp_path / "0.partial").write_bytes(b"half")
    assert FeatureCache(tmp_path).missing(["a"]) == []
    path = next(tmp_path.glob("*.safetensors"))
    assert load_file(path)["features"].dtype == torch.float32
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=rf"{path.name} is damaged .*: delete it"):
        FeatureCache(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--feature_dir: .*file.* cannot be written to"):
        FeatureCache(tmp_path / "file" / "cache")
