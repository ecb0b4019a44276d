"""Linear probe: how well a linear classifier on frozen embeddings tells the classes apart."""

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.similarity import finite_rows

# Inverse strengths of the L2 penalty tried, weakest last.
_GRID = tuple(10.0**power for power in range(-5, 3))
_HELD_OUT = 0.2
_STEPS = 500
_TINY = 1e-30


def linear_probe_top1(
    train: NDArray[np.floating],
    train_labels: Sequence[str] | Sequence[int],
    test: NDArray[np.floating],
    test_labels: Sequence[str] | Sequence[int],
    *,
    seed: int = 0,
) -> float:
    """Share of `test` [Q, D] that multinomial logistic regression on `train` [N, D] gets right.

    Features are standardised by the training set. The L2 penalty is the one of a grid by decades
    that gets most right of a fifth of each class, held out by `seed`, and of equals the likeliest;
    the classifier is then fitted on all of the training set. The same input gives the same result.
    Embeddings that are not finite are not trained on and never right.
    Raises InputError when D differs, there is nothing to test, or fewer than two classes to train
    on; MissingExtraError without scikit-learn.
    """
    if find_spec("sklearn") is None:
        raise MissingExtraError("the linear probe", extra="eval", module="scikit-learn")
    if len(train) != len(train_labels) or len(test) != len(test_labels):
        raise ValueError("there must be one label for each embedding")
    if len(test) == 0:
        raise InputError("no images to test the linear probe on")
    if train.shape[1:] != test.shape[1:]:
        raise InputError(
            f"the linear probe is trained on embeddings of {train.shape[1]} numbers "
            f"and tested on {test.shape[1]}"
        )
    usable, answerable = finite_rows(train), finite_rows(test)
    names, classes = np.unique(np.asarray(train_labels)[usable], return_inverse=True)
    if len(names) < 2:
        raise InputError("the linear probe needs two or more classes to train on")
    features, queries = _standardise(train[usable], test[answerable])
    model = _fit(features, classes, _choose(features, classes, seed))
    if len(queries) == 0:
        return 0.0
    right = names[model.predict(queries)] == np.asarray(test_labels)[answerable]
    return float(right.sum()) / len(test)


def _standardise(
    train: NDArray[np.floating], test: NDArray[np.floating]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both by the mean and deviation of `train`; features that never vary become zero."""
    center = train.mean(axis=0, dtype=np.float64)
    spread = train.std(axis=0, dtype=np.float64)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)
    first, second = ((part - center) * scale for part in (train, test))
    return first.astype(np.float32), second.astype(np.float32)


def _choose(features: NDArray[np.float32], classes: NDArray[np.integer], seed: int) -> float:
    """The best of the grid on held-out rows; the middle one where no class has two rows."""
    held = _hold_out(classes, seed)
    if not held.any():
        return _GRID[len(_GRID) // 2]
    scores = []
    for strength in _GRID:
        model = _fit(features[~held], classes[~held], strength)
        chances = model.predict_proba(features[held])
        right = int((chances.argmax(axis=1) == classes[held]).sum())
        # of equals the surest: one that all but ignores the features is right by luck
        sure = np.log(np.maximum(chances[np.arange(len(chances)), classes[held]], _TINY))
        scores.append((right, float(sure.sum(dtype=np.float64))))
    return _GRID[scores.index(max(scores))]


def _hold_out(classes: NDArray[np.integer], seed: int) -> NDArray[np.bool_]:
    """[N]: a fifth of each class, at least one row, of those that have two or more."""
    random = np.random.default_rng(seed)
    held = np.zeros(len(classes), dtype=np.bool_)
    for rows in (np.flatnonzero(classes == number) for number in np.unique(classes)):
        count = max(1, int(_HELD_OUT * len(rows))) if len(rows) > 1 else 0
        held[random.permutation(rows)[:count]] = True
    return held


def _fit(features: NDArray[np.float32], classes: NDArray[np.integer], strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the weakest penalties may not settle
        return model.fit(features, classes)
