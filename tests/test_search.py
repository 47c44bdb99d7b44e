"""Exact search of neighbours, whatever the chunks and whoever multiplies."""

import numpy as np
import pytest
import torch

from dino_sparo.evaluation.knn import nearest

TRAIN, TEST, WIDTH, K = 57, 23, 16, 9


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(number, WIDTH)).astype(np.float16) for number in (TRAIN, TEST)]


def by_sorting(train, test, k):
    """All cosines, sorted."""
    train, test = (torch.from_numpy(x).double() for x in (train, test))
    cosine = (test / test.norm(dim=1, keepdim=True)) @ (train / train.norm(dim=1, keepdim=True)).T
    return cosine.sort(dim=1, descending=True, stable=True).values[:, :k], cosine.argsort(
        dim=1, descending=True, stable=True
    )[:, :k]


@pytest.mark.parametrize("by_faiss", [True, False])
@pytest.mark.parametrize(("train_chunk", "test_chunk"), [(None, None), (1, 1), (5, 7), (56, 22), (57, 100)])
def test_the_nearest_in_order(features, by_faiss, train_chunk, test_chunk):
    chunks = {"train_chunk": train_chunk, "test_chunk": test_chunk}
    cosines, numbers = nearest(*features, K, by_faiss=by_faiss, **chunks)
    expected_cosines, expected_numbers = by_sorting(*features, K)
    assert torch.equal(numbers, expected_numbers)
    torch.testing.assert_close(cosines, expected_cosines.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("by_faiss", [True, False])
def test_of_equally_near_images_the_first_comes_first(by_faiss):
    train = np.eye(4, dtype=np.float32)[[2, 0, 0, 1, 0]]
    cosines, numbers = nearest(train, train[1:2], 4, by_faiss=by_faiss, train_chunk=2)
    assert numbers[0, :3].tolist() == [1, 2, 4] and cosines[0].tolist() == [1, 1, 1, 0]


def test_features_stay_on_disk_and_all_neighbours_can_be_asked_for(features, tmp_path):
    train = np.memmap(tmp_path / "train", np.float16, mode="w+", shape=features[0].shape)
    train[:] = features[0]
    _, numbers = nearest(train, torch.from_numpy(features[1]), TRAIN, train_chunk=10)
    assert torch.equal(numbers, by_sorting(*features, TRAIN)[1])
    assert isinstance(train, np.memmap) and np.array_equal(train, features[0])


@pytest.mark.parametrize("by_faiss", [True, False])
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_what_is_given_stays_as_it_is(features, by_faiss, kind):
    given = [kind(rows.astype(np.float32)) for rows in features]
    before = [np.asarray(rows).copy() for rows in given]
    nearest(*given, K, by_faiss=by_faiss)
    assert all(np.array_equal(rows, old) for rows, old in zip(given, before, strict=True))


def test_no_test_images(features):
    cosines, numbers = nearest(features[0], features[1][:0], K)
    assert cosines.shape == numbers.shape == (0, K)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_feature_without_direction_is_named(features, side, value):
    features[side][11] = value
    kind = "zero" if value == 0 else "not finite"
    with pytest.raises(ValueError, match=f"{('train', 'test')[side]} image 11 is {kind}"):
        nearest(*features, K, train_chunk=4, test_chunk=5)
