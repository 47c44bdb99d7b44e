"""k-NN against the official figures."""

from functools import partial

import numpy as np
import pytest
import torch

from dino_sparo.evaluation import knn
from dino_sparo.evaluation.knn import knn_classify, nearest

KS = [1, 10, 20, 100, 200]


@pytest.mark.parametrize("by_faiss", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 256, 3000])
def test_golden_accuracies(golden, chunk_size, by_faiss, monkeypatch):
    arrays = golden("knn")
    chunks = {"train_chunk": chunk_size + 200, "test_chunk": chunk_size}
    monkeypatch.setattr(knn, "nearest", partial(nearest, by_faiss=by_faiss, **chunks))
    tensors = [
        torch.from_numpy(arrays[f"{s}_{k}"]) for s in ("train", "test") for k in ("features", "labels")
    ]
    monkeypatch.setattr(knn, "VOTE_CHUNK", chunk_size)
    results = knn_classify(*tensors, k=KS, temperature=float(arrays["temperature"]))
    for k in KS:
        np.testing.assert_array_equal([results[k].top1, results[k].top5], arrays[f"top1_top5.k{k}"])
        assert results[k].num_images == 400


def test_scale_of_features_and_type_do_not_matter(golden):
    arrays = golden("knn")
    train, test = torch.from_numpy(arrays["train_features"]), torch.from_numpy(arrays["test_features"])
    labels = [torch.from_numpy(arrays[f"{s}_labels"]) for s in ("train", "test")]
    scaled = knn_classify(17 * train, labels[0], (0.01 * test).double(), labels[1], k=20)[20]
    assert [scaled.top1, scaled.top5] == arrays["top1_top5.k20"].tolist()


def test_numpy_arrays_as_they_are(golden):
    arrays = golden("knn")
    given = [arrays[f"{s}_{kind}"] for s in ("train", "test") for kind in ("features", "labels")]
    assert knn_classify(*given, k=20)[20].top1 == arrays["top1_top5.k20"][0]
    given[1], given[3] = given[1].astype(np.uint16), given[3].astype(np.uint16)
    assert knn_classify(*given, k=np.int64(20))[20].top1 == arrays["top1_top5.k20"][0]


def test_ties_go_to_the_lower_class_also_among_classes_without_votes():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    test = torch.tensor([[1.0, 0.0]] * 4)
    # Classes 1 and 3 have equal votes, 0, 2, 4, 5 have none: ranking 1 3 0 2 4 5.
    result = knn_classify(train, torch.tensor([3, 1]), test, torch.tensor([1, 3, 4, 5]), k=2, num_classes=6)[
        2
    ]
    assert result.top1 == 25.0
    assert result.top5 == 50.0  # with k = 2 the official top-5 looks at two classes only


def test_k_one_top5_equals_top1(golden):
    arrays = golden("knn")
    assert arrays["top1_top5.k1"][0] == arrays["top1_top5.k1"][1]


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k):
    features, labels = torch.eye(3), torch.arange(3)
    with pytest.raises(ValueError, match=f"k is {k}, expected 1 to the 3 train images"):
        knn_classify(features, labels, features, labels, k=k)


def test_no_test_images():
    with pytest.raises(ValueError, match="no test images"):
        knn_classify(torch.eye(3), torch.arange(3), torch.empty(0, 3), torch.empty(0, dtype=torch.int64), k=1)
