"""Kernel regression on a part of CIFAR-10: ``python examples/cifar10.py cifar10.npz``.

The file holds ``train_images`` and ``test_images``, (n, 32, 32, 3) uint8 (images of any size will do), and
``train_labels`` and ``test_labels``, (n,) integers. Two convolutional networks of infinite width (Arora et al., arXiv
1904.11955): readout of all positions, and global average pooling, whose kernel takes a thousand times as long, on fewer
images. Kernels larger than memory, or longer than a night: ``ntkfast.gram_to_file``.
"""

from __future__ import annotations

import argparse
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import ntkfast as nf

#: Of the mean of the diagonal of K: too small to matter unless K is singular to rounding.
RIDGE = {"float32": 1e-5, "float64": 1e-9}
#: Images of the whole data set, training and test.
WHOLE = 50_000, 10_000


@dataclass(frozen=True)
class Images:
    """Images (n, height, width, channels) in units of the standard deviation of the channel, and their classes (n,)."""

    x: np.ndarray
    label: np.ndarray

    def first(self, count: int) -> Images:
        return Images(self.x[:count], self.label[:count])


def load(path: Path, dtype: str) -> tuple[Images, Images]:
    """Training and test images of the file."""
    parts = []
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            for part in ("train", "test"):
                x, label = file[f"{part}_images"].astype(dtype), file[f"{part}_labels"]
                if x.ndim != 4 or label.shape != x.shape[:1]:
                    raise ValueError(f"{path}: {part}_images {x.shape} and {part}_labels {label.shape} do not match "
                                     "(n, height, width, channels) and (n,)")  # fmt: skip
                parts.append((x, label.astype(int)))
    except (KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a .npz file with train_images, train_labels, test_images, test_labels: "
                         f"{error}") from None  # fmt: skip
    mean, deviation = (f(parts[0][0], axis=(0, 1, 2)) for f in (np.mean, np.std))
    train, test = (Images((x - mean) / np.where(deviation > 0, deviation, 1), label) for x, label in parts)
    return train, test


def accuracy(K: np.ndarray, K_test: np.ndarray, train: Images, test: Images, ridge: float) -> float:
    """Percent of the test images that kernel regression on centred one-hot targets gets right."""
    target = np.eye(1 + max(train.label.max(), test.label.max()))[train.label]
    mean = target.mean(axis=0)
    weights = np.linalg.solve(K + ridge * np.eye(len(K)), target - mean)
    return 100 * float(np.mean(np.argmax(K_test @ weights + mean, axis=1) == test.label))


def duration(seconds: float) -> str:
    """In the unit a person would choose."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def report(net: nf.ConvNetwork, train: Images, test: Images) -> str:
    """One network: both kernels, and a line about them."""
    n, m = len(train.x), len(test.x)
    start = time.perf_counter()
    K = nf.gram(net, train.x, progress=True)
    K_test = nf.gram(net, test.x, train.x, progress=True)
    seconds = time.perf_counter() - start
    each = seconds / (n * (n + 1) / 2 + m * n)
    ridge = RIDGE[str(K.dtype)] * float(np.trace(K)) / n
    # Sums over the positions of float32 images are good to float32; what is made of them should not lose more.
    K, K_test = K.astype(np.float64), K_test.astype(np.float64)
    least = float(np.linalg.eigvalsh(K)[0]) * n / float(np.trace(K))
    right = accuracy(K, K_test, train, test, ridge)
    images, others = WHOLE
    whole = duration(each * (images * (images + 1) / 2 + others * images))
    return (f"{net.pooling:8} depth {net.depth}: {right:.1f} % of {m:,} right ({n:,} training images), least "
            f"eigenvalue {least:.2e} (mean of the diagonal 1), {seconds:.1f} s, {1e6 * each:.3g} us per pair; all "
            f"{images:,} + {others:,} images: {whole}")  # fmt: skip


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that counts something."""

    def count(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return count


def main(argv: list[str] | None = None) -> int:
    """Print one line for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--depth", type=at_least(1), default=10, help="convolutions, with readout of all positions (10)"
    )
    parser.add_argument("--train", type=at_least(1), default=4000, help="training images (4000)")
    parser.add_argument("--test", type=at_least(1), default=1000, help="test images (1000)")
    parser.add_argument("--pooled-depth", type=at_least(1), default=5, help="convolutions, with average pooling (5)")
    parser.add_argument(
        "--pooled-train", type=at_least(0), default=100, help="training images; 0: without pooling (100)"
    )
    parser.add_argument("--pooled-test", type=at_least(1), default=100, help="test images (100)")
    parser.add_argument("--dtype", choices=sorted(RIDGE), default="float32")
    options = parser.parse_args(argv)
    try:
        train, test = load(options.file, options.dtype)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{options.file}: {len(train.x):,} training images, {len(test.x):,} test images, {train.x.shape[1:]}, "
          f"{options.dtype}; chance {100 * np.bincount(test.label).max() / len(test.x):.0f} %", flush=True)  # fmt: skip
    print(report(nf.conv_net(options.depth), train.first(options.train), test.first(options.test)), flush=True)
    if options.pooled_train:
        net = nf.conv_net(options.pooled_depth, readout="gap")
        print(report(net, train.first(options.pooled_train), test.first(options.pooled_test)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
