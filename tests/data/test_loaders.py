import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from sketch_perceptual.data.loaders import ShapeSampler, pk_batches
from sketch_perceptual.seeds import generator


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 5), st.integers(0, 99))
def test_batches_hold_each_drawing_once_in_groups_of_k(labels, p, k, seed):
    batches = pk_batches(labels, p, k, generator(seed))
    assert sorted(itertools.chain(*batches)) == list(range(len(labels)))
    for batch in batches:
        counts = [sum(labels[index] == label for index in batch) for label in {labels[index] for index in batch}]
        assert len(counts) <= p
        assert max(counts) <= k
    assert batches == pk_batches(labels, p, k, generator(seed))


def test_balanced_classes_fill_batches_and_orders_differ_by_seed():
    labels = [index % 8 for index in range(160)]
    batches = pk_batches(labels, 4, 5, generator(0))
    assert sum(len(batch) == 20 for batch in batches) >= 6
    assert batches != pk_batches(labels, 4, 5, generator(1))


def test_batches_of_one_shape_hold_each_image_once_in_another_order_each_epoch():
    shapes = ["wide", "high", "wide", "square", "wide", "high", "wide", "wide", "high", "high"]
    sampler, orders = ShapeSampler(shapes, 2, seed=0), []
    for sampler.epoch in (0, 1, 0):
        batches = list(sampler)
        assert sorted(itertools.chain(*batches)) == [(sampler.epoch, index) for index in range(10)]
        assert all(len({shapes[index] for _, index in batch}) == 1 for batch in batches)
        assert sorted(map(len, batches)) == [1, 1, 2, 2, 2, 2]
        assert len(sampler) == len(batches)
        orders.append([index for batch in batches for _, index in batch])
    assert orders[0] == orders[2] != orders[1]
