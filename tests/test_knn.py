"""k-NN against official results, and the search of neighbors, independent of the chunk size."""

from functools import partial

import numpy as np
import pytest
import torch

from dino_sparo.evaluation import knn
from dino_sparo.evaluation.knn import knn_classify
from dino_sparo.evaluation.search import nearest

KS = [1, 10, 20, 100, 200]
TRAIN, TEST, WIDTH, K = 57, 23, 16, 9
SEARCHES = [{"by_faiss": True}, {"bfloat16": False}, {"bfloat16": True}]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("chunk_size", [pytest.param(1, marks=pytest.mark.long), 7, 256, 3000])
def test_golden_accuracies(golden, chunk_size, search, monkeypatch):
    arrays = golden("knn")
    chunks = {"train_chunk": chunk_size + 200, "test_chunk": chunk_size}
    monkeypatch.setattr(knn, "nearest", partial(nearest, **search, **chunks))
    tensors = [
        torch.from_numpy(arrays[f"{s}_{k}"]) for s in ("train", "test") for k in ("features", "labels")
    ]
    monkeypatch.setattr(knn, "VOTE_CHUNK", chunk_size)
    results = knn_classify(*tensors, k=KS, temperature=float(arrays["temperature"]))
    for k in KS:
        np.testing.assert_array_equal([results[k].top1, results[k].top5], arrays[f"top1_top5.k{k}"])
        assert results[k].num_images == 400


def test_scale_and_type_of_features_and_labels_do_not_matter(golden):
    arrays = golden("knn")
    given = [arrays[f"{s}_{kind}"] for s in ("train", "test") for kind in ("features", "labels")]
    train, truth, test, right = map(torch.from_numpy, given)
    short = [given[0], given[1].astype(np.uint16), given[2], given[3].astype(np.uint16)]
    for some in (given, short, (17 * train, truth, (0.01 * test).double(), right)):
        found = knn_classify(*some, k=np.int64(20))[20]
        assert [found.top1, found.top5] == arrays["top1_top5.k20"].tolist()


def test_ties_go_to_the_lower_class_also_among_classes_without_votes():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    test = torch.tensor([[1.0, 0.0]] * 4)
    # Classes 1 and 3 have equal votes, 0, 2, 4, 5 have none: ranking 1 3 0 2 4 5.
    result = knn_classify(train, torch.tensor([3, 1]), test, torch.tensor([1, 3, 4, 5]), k=2, num_classes=6)[
        2
    ]
    assert result.top1 == 25.0
    assert result.top5 == 50.0  # with k = 2 the official top-5 looks at two classes only


@pytest.mark.parametrize(
    ("k", "num_test", "message"),
    [(0, 3, "k is 0; expected 1 to 3"), (4, 3, "k is 4; expected"), (1, 0, "no test images")],
)
def test_nothing_to_vote(k, num_test, message):
    features, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=message):
        knn_classify(features, labels, features[:num_test], labels[:num_test], k=k)


def test_too_many_labels_or_no_k_are_refused():
    features, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=r"4 labels of 3 train images and 3 of 3 test images"):
        knn_classify(features, torch.arange(4), features, labels, k=1)
    with pytest.raises(ValueError, match=r"k is empty"):
        knn_classify(features, labels, features, labels, k=[])


# --- The search


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(number, WIDTH)).astype(np.float16) for number in (TRAIN, TEST)]


def by_sorting(train, test, k):
    """Neighbors from all cosines, sorted."""
    train, test = (torch.from_numpy(x).double() for x in (train, test))
    cosine = (test / test.norm(dim=1, keepdim=True)) @ (train / train.norm(dim=1, keepdim=True)).T
    return cosine.sort(dim=1, descending=True, stable=True).values[:, :k], cosine.argsort(
        dim=1, descending=True, stable=True
    )[:, :k]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("train_chunk", "test_chunk"), [(None, None), (1, 1), (5, 7), (56, 22), (57, 100)])
def test_the_nearest_in_order(features, search, train_chunk, test_chunk):
    chunks = {"train_chunk": train_chunk, "test_chunk": test_chunk}
    cosines, numbers = nearest(*features, K, **search, **chunks)
    expected_cosines, expected_numbers = by_sorting(*features, K)
    assert torch.equal(numbers, expected_numbers)
    torch.testing.assert_close(cosines, expected_cosines.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_of_equally_near_images_the_first_comes_first(search):
    train = np.eye(4, dtype=np.float32)[[2, 0, 0, 1, 0]]
    cosines, numbers = nearest(train, train[1:2], 4, **search, train_chunk=2)
    assert numbers[0, :3].tolist() == [1, 2, 4] and cosines[0].tolist() == [1, 1, 1, 0]


def near_ties(few: bool):
    """Images whose cosines to a test image differ by more than float32 rounds and less than bfloat16 does:
    some of them among many others that are far away, or all."""
    rng = np.random.default_rng(0)
    total, width, number = 2003, 32, 6
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    test, others = basis[:number], basis[number:]
    cosines = np.full((total, number), -0.3)
    tied = np.array_split(rng.permutation(total)[: 240 if few else total], number)
    for query, some in enumerate(tied):
        cosines[some, query] = 0.02 + 2e-6 * rng.permutation(len(some))
    aside = rng.normal(size=(total, width - number))
    aside *= np.sqrt((1 - (cosines**2).sum(axis=1)) / (aside**2).sum(axis=1))[:, None]
    train = cosines @ test + aside @ others
    return train, test


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("train_chunk", [None, 400, 701])
def test_rounding_to_bfloat16_changes_no_neighbor_also_of_near_ties(few, train_chunk):
    train, test = near_ties(few)
    expected_cosines, expected = by_sorting(train, test, K)
    cosines, numbers = nearest(train, test, K, bfloat16=True, train_chunk=train_chunk)
    assert torch.equal(numbers, expected)
    torch.testing.assert_close(cosines, expected_cosines.float(), atol=3e-7, rtol=0)
    rounded = [torch.from_numpy(rows / np.linalg.norm(rows, axis=1)[:, None]) for rows in (test, train)]
    by_product = (rounded[0].bfloat16() @ rounded[1].bfloat16().T).topk(K, dim=1).indices
    assert not torch.equal(by_product.sort().values, expected.sort().values)


@pytest.mark.parametrize("search", SEARCHES[1:])
def test_of_very_many_equally_near_images_the_first_come_after_the_nearer_ones(search):
    train = np.eye(2)[np.isin(np.arange(3001), [100, 1200, 2900]).astype(int)]
    cosines, numbers = nearest(train, np.eye(2)[1:], K, train_chunk=1500, **search)
    assert cosines[0].tolist() == [1] * 3 + [0] * 6
    assert numbers[0].tolist() == [100, 1200, 2900, 0, 1, 2, 3, 4, 5]


def test_features_stay_on_disk_and_all_neighbors_can_be_asked_for(features, tmp_path):
    train = np.memmap(tmp_path / "train", np.float16, mode="w+", shape=features[0].shape)
    train[:] = features[0]
    _, numbers = nearest(train, torch.from_numpy(features[1]), TRAIN, train_chunk=10)
    assert torch.equal(numbers, by_sorting(*features, TRAIN)[1])
    assert isinstance(train, np.memmap) and np.array_equal(train, features[0])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_what_is_given_stays_as_it_is(features, search, kind):
    given = [kind(rows.astype(np.float32)) for rows in features]
    before = [np.asarray(rows).copy() for rows in given]
    nearest(*given, K, **search)
    assert all(np.array_equal(rows, old) for rows, old in zip(given, before, strict=True))


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_feature_without_direction_is_named(features, side, value):
    features[side][11] = value
    kind = "zero" if value == 0 else "not finite"
    with pytest.raises(ValueError, match=f"{('train', 'test')[side]} image 11 is {kind}"):
        nearest(*features, K, train_chunk=4, test_chunk=5)
