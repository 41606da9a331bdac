"""The neighbours' votes agree with scikit-learn and with a loop, and their number is the one that is best on val."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mwm.transfer.knn import choose_neighbours, knn_probabilities


def drawn(count: int, seed: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return torch.from_numpy((rng.normal(size=(count, 5)) + 1.2 * np.eye(5)[labels]).astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("k", [1, 4, 30])
def test_votes_agree_with_a_loop_and_with_scikit_learn(k: int) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    (bank, labels), (queries, _) = drawn(30, 0), drawn(12, 1)
    found = knn_probabilities(bank, labels, queries, k, 3)
    unit = lambda x: x.double() / x.double().norm(dim=1, keepdim=True)  # noqa: E731
    for row, query in zip(found, unit(queries), strict=True):
        cosine = [(float(query @ b), int(y)) for b, y in zip(unit(bank), labels, strict=True)]
        votes = np.zeros(3)
        for value, label in sorted(cosine, reverse=True)[:k]:
            votes[label] += np.exp(value / 0.07)
        assert np.allclose(row, votes / votes.sum(), rtol=1e-9)
    judge = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)).fit(bank.double(), labels)
    assert np.allclose(found[:, judge.classes_], judge.predict_proba(queries.double()), atol=1e-6)


def test_scale_of_features_and_order_of_the_bank_do_not_matter() -> None:
    (bank, labels), (queries, _) = drawn(40, 2), drawn(7, 3)
    order = torch.randperm(40)
    assert torch.allclose(knn_probabilities(bank, labels, queries, 5, 3), knn_probabilities(3 * bank[order], labels[order], 0.2 * queries, 5, 3), atol=1e-5)


def test_more_neighbours_than_images_are_all_of_them() -> None:
    (bank, labels), (queries, _) = drawn(6, 4), drawn(3, 5)
    assert torch.equal(knn_probabilities(bank, labels, queries, 50, 3), knn_probabilities(bank, labels, queries, 6, 3))


def test_the_number_that_val_likes_best_is_taken() -> None:
    (bank, labels), (queries, truth) = drawn(60, 6), drawn(80, 7)
    k, rows = choose_neighbours(bank, labels, queries, truth.numpy(), 3)
    assert [row["k"] for row in rows] == [1, 3, 5, 10, 20, 50]
    assert max(row["val_auroc"] for row in rows) == next(row["val_auroc"] for row in rows if row["k"] == k)
    assert k > 1  # classes that overlap are told apart better by many neighbours
