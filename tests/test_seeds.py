import torch

from sketch_perceptual.seeds import generator


def test_generator_is_its_key():
    assert torch.rand(1, generator=generator(0, "noise", 3)) == torch.rand(1, generator=generator(0, "noise", 3))
    keys = [(0, 1, 23), (0, 12, 3), (0, 1, "23"), (1, 0, 23), (0,), ("0",)]
    assert len({torch.rand(1, generator=generator(*key)).item() for key in keys}) == len(keys)
