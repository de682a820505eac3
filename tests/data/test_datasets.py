import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sketch_perceptual.data.datasets import CaptionedImages
from sketch_perceptual.data.images import fit_image, to_tensor
from sketch_perceptual.errors import InputError


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def stripes(width, height):
    """Column x is red x, row y is green y: a pixel tells where it came from."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8))


def write(path, content=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def striped(tmp_path):
    """Six images whose columns differ, with two captions each."""
    paths = [write(tmp_path / f"{i}.png", saved(stripes(40, 8))) for i in range(6)]
    return CaptionedImages(paths, [p.name for p in paths], [["a", "b"]] * 6, resolution=8, random_flip=True)


def fingerprints(loader):
    return {
        name: (caption, pixels.sum().item(), pixels[0, 0, 0].item())
        for batch in loader
        for name, caption, pixels in zip(batch["name"], batch["caption"], batch["pixel_values"], strict=True)
    }


def test_draws_do_not_depend_on_workers_order_or_subset(striped):
    keys = [(3, index) for index in range(6)]
    alone = fingerprints(DataLoader(striped, sampler=keys))
    assert len(set(alone.values())) > 3  # draws differ between items
    torch.manual_seed(1)
    assert fingerprints(DataLoader(striped, sampler=keys[::-1], batch_size=4, num_workers=2)) == alone
    spawned = DataLoader(striped, sampler=keys, num_workers=1, multiprocessing_context="spawn")
    assert fingerprints(spawned) == alone
    subset = striped.select([5, 2]).select([1])
    assert fingerprints(DataLoader(subset, sampler=[(3, 0)])) == {"2.png": alone["2.png"]}


def test_draws_change_with_epoch_and_seed_and_leave_the_global_generator(striped):
    def draws(data, epoch):
        return fingerprints(DataLoader(data, sampler=[(epoch, i) for i in range(6)]))

    other = CaptionedImages(striped.sources, striped.names, striped.captions, resolution=8, random_flip=True, seed=1)
    assert draws(striped, 0) != draws(striped, 1)
    assert draws(striped, 0) != draws(other, 0)
    before = torch.random.get_rng_state()
    striped[0, 0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_crop_flip_and_caption_comes_up(striped):
    items = [striped[epoch, 0] for epoch in range(400)]
    assert {item["caption"] for item in items} == {"a", "b"}
    rows = [((item["pixel_values"][0, 0] + 1) * 127.5).round().int() for item in items]
    assert {int(row.min()) for row in rows} == set(range(33))
    assert 160 < sum(bool(row[0] > row[1]) for row in rows) < 240


def test_centre_crop_without_flip_is_the_same_each_epoch(striped):
    plain = CaptionedImages(striped.sources, striped.names, striped.captions, resolution=8, center_crop=True)
    pixels = [plain[epoch, 0]["pixel_values"] for epoch in range(20)]
    assert all(torch.equal(x, to_tensor(fit_image(stripes(40, 8), 8))) for x in pixels)


def test_switching_the_flip_on_leaves_crop_and_caption(striped):
    still = CaptionedImages(striped.sources, striped.names, striped.captions, resolution=8)
    for epoch in range(10):
        flipped, plain = striped[epoch, 0], still[epoch, 0]
        assert flipped["caption"] == plain["caption"]
        assert torch.equal(flipped["pixel_values"].sort().values, plain["pixel_values"].sort().values)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_lost_during_training_is_named_without_a_traceback(workers, tmp_path):
    data = CaptionedImages([tmp_path / "1.png"], ["sketches/1.png"], ["x"])
    with pytest.raises(InputError, match=r"^Cannot read the image sketches/1\.png: there is no such file\.$"):
        list(DataLoader(data, sampler=[(0, torch.tensor(0).item())], num_workers=workers))


def test_names_are_on_one_line_in_messages(tmp_path):
    data = CaptionedImages([tmp_path / "a\nb.png"], [str(tmp_path / "a\nb.png")], ["x"])
    assert data.name(0) == f"{tmp_path}/a\\nb.png"
    stripes(8, 8).save(tmp_path / "a\nb.png")
    assert data[0, 0]["name"] == data.name(0)


@pytest.mark.parametrize("fit", ["crop", "pad", "bucket"])
@pytest.mark.parametrize("beside", [None, "mask/a.png", "a-masklabel.png"])
def test_a_mask_lies_where_its_image_does(tmp_path, fit, beside):
    opaque = Image.new("L", (60, 40), 0)
    opaque.paste(255, (30, 10, 60, 30))
    image = Image.new("RGBA", opaque.size, "black")
    image.putalpha(opaque)
    image.save(tmp_path / "a.png")
    if beside:
        Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").save(tmp_path / "a.png")
        (tmp_path / "mask").mkdir()
        opaque.save(tmp_path / beside)
    data = CaptionedImages(
        [tmp_path / "a.png"], ["a.png"], ["a"], resolution=32, fit=fit, random_flip=True, alpha_mask=True
    )
    data.multiple = 4
    sides = set()
    for epoch in range(20):
        example = data[epoch, 0]
        black = (1 - example["pixel_values"][:1]) / 2
        torch.testing.assert_close(example["mask"], black, rtol=0, atol=0.02)
        sides.add(bool(black[..., : black.shape[-1] // 2].sum() < black.sum() / 2))
    assert sides == {False, True}


def test_what_is_opaque_counts_and_masks_of_another_size_are_refused(tmp_path):
    Image.new("RGB", (60, 40), "white").save(tmp_path / "a.jpg")
    data = CaptionedImages([tmp_path / "a.jpg"], ["a.jpg"], ["a"], resolution=32, fit="pad", alpha_mask=True)
    assert data[0, 0]["mask"].mean() == pytest.approx(21 / 32)  # the padding does not
    (tmp_path / "mask").mkdir()
    Image.new("L", (40, 60)).save(tmp_path / "mask" / "a.png")
    with pytest.raises(InputError, match=r"mask.a\.png has 40 x 60 pixels, its image 60 x 40"):
        data[0, 0]


def tagged(captions, **options):
    return CaptionedImages(["x.png"] * len(captions), [f"{n}.png" for n in range(len(captions))], captions, **options)


def captions_of(data, epoch):
    data.with_pixels = False
    return [data[epoch, index]["caption"] for index in range(len(data))]


def test_captions_are_dropped_at_their_share_and_otherwise_whole():
    data = tagged(["a, b"] * 1000, caption_dropout=0.3)
    dropped = [captions_of(data, epoch).count("") for epoch in range(3)]
    assert all(250 < count < 350 for count in dropped) and len(set(dropped)) > 1
    assert set(captions_of(data, 0)) == {"", "a, b"}
    assert "" not in captions_of(tagged(["a"] * 1000), 0)


def test_shuffled_tags_belong_to_seed_epoch_and_item():
    captions = [", ".join("abcdefgh")] * 4
    data = tagged(captions, shuffle_tags=True)
    first = captions_of(data, 0)
    assert first == captions_of(tagged(captions, shuffle_tags=True), 0)
    assert len(set(first)) == 4
    assert captions_of(data.select([2]), 0) == first[2:3]
    assert not set(first) & {*captions_of(data, 1), *captions_of(tagged(captions, shuffle_tags=True, seed=1), 0)}


# caption, keep_tags -> how each begins, the tags that move
KEPT = [
    ("a, b, c, d", 0, "ink, ", "abcd"),
    ("a, b, c, d", 1, "ink, ", "abcd"),
    ("a, b, c, d", 3, "ink, a, b, ", "cd"),
    ("Ink, a, b, c", 0, "Ink, ", "abc"),
    ("a, b, c, red ink", 2, "a, b, ", ["c", "red ink"]),
]


@pytest.mark.parametrize("caption, keep, start, moving", KEPT)
def test_the_trigger_is_a_tag_that_is_kept(caption, keep, start, moving):
    data = tagged([caption], trigger_word="ink", shuffle_tags=True, keep_tags=keep)
    seen = {captions_of(data, epoch)[0] for epoch in range(200)}
    assert seen == {start + ", ".join(order) for order in itertools.permutations(moving)}


def test_dropping_and_shuffling_leave_crops_and_flips(striped):
    plain = CaptionedImages(striped.sources, striped.names, striped.captions, resolution=8, random_flip=True)
    other = CaptionedImages(
        striped.sources, striped.names, striped.captions, resolution=8, random_flip=True, caption_dropout=0.5
    )
    pairs = [(plain[0, index], other[0, index]) for index in range(6)]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in pairs)
    assert {b["caption"] for _, b in pairs} > {""}


def test_repeated_images_are_items_with_their_own_draws(striped):
    striped.repeats = [1, 3, 1, 1, 1, 2]
    data, indices = striped.select([0, 1, 5]).repeated()
    assert indices == [0, 1, 2, 1, 1, 2]
    assert [data.name(index) for index in range(len(data))] == [f"{n}.png" for n in (0, 1, 5, 1, 1, 5)]
    items = [data[0, index] for index in range(len(data))]
    assert all(torch.equal(items[n]["pixel_values"], striped[0, (0, 1, 5)[n]]["pixel_values"]) for n in range(3))
    pixels = [item["pixel_values"].flatten().tolist() for item in items if item["name"] == "1.png"]
    assert len(pixels) == 3 and pixels[0] != pixels[1] != pixels[2] != pixels[0]
    assert len(striped) == 6
