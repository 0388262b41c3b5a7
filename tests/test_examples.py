"""The scripts of examples/, on small made-up data of the layout they expect."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import ntkfast as nf
from ntkfast.reference import convolution

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def cifar10():
    spec = importlib.util.spec_from_file_location("cifar10", EXAMPLES / "cifar10.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cifar10"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cifar10"]


def write(path, **changes):
    """Images of three classes, a bright channel each, in the layout of CIFAR-10."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 30), ("test", 12)):
        label = np.arange(n) % 3
        x = rng.integers(0, 200, (n, 6, 5, 3))
        x[np.arange(n), ..., label] += 55
        arrays |= {f"{part}_images": x.astype(np.uint8), f"{part}_labels": label.astype(np.uint8)}
    np.savez(path, **{name: array for name, array in (arrays | changes).items() if array is not None})
    return path


LINE = re.compile(
    r"(\w+) +depth (\d+): ([\d.]+) % of (\d+) right \((\d+) training images\), least eigenvalue ([\d.e+-]+) .*, "
    r"([\d.]+) s, ([\d.e+-]+) us per pair; all 50,000 \+ 10,000 images: [\d.e+]+ \w+"
)


def test_cifar10(cifar10, tmp_path, capsys):
    path = write(tmp_path / "images.npz")
    options = ("--depth", "3", "--pooled-depth", "2", "--pooled-train", "24", "--pooled-test", "9")
    assert cifar10.main([str(path), *options, "--dtype", "float64"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.endswith("30 training images, 12 test images, (6, 5, 3), float64; chance 33 %")
    found = [LINE.fullmatch(line).groups() for line in lines]
    assert [row[:2] + row[3:5] for row in found] == [("flatten", "3", "12", "30"), ("gap", "2", "9", "24")]
    train, _ = cifar10.load(path, "float64")
    for (readout, depth, right, _, n, least, _, each), percent in zip(found, (80, 100), strict=True):
        assert float(right) >= percent
        K = convolution.gram(nf.conv_net(int(depth), readout=readout), train.x[: int(n)])["ntk"]
        assert float(least) == pytest.approx(np.linalg.eigvalsh(K)[0] / np.diag(K).mean(), rel=6e-3)
        assert float(each) > 0


def test_cifar10_without_pooling_in_float32(cifar10, tmp_path, capsys):
    rng = np.random.default_rng(1)
    path = write(tmp_path / "images.npz", train_labels=rng.integers(0, 3, 30), test_labels=rng.integers(0, 3, 12))
    assert cifar10.main([str(path), "--depth", "2", "--pooled-train", "0"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert float(LINE.fullmatch(line).group(3)) < 80  # the classes were drawn at random


@pytest.mark.parametrize(("changes", "words"), [
    ({"test_labels": None}, "test_labels"), ({"train_labels": np.zeros(7)}, "do not match"),
    ({"train_images": np.zeros((30, 90))}, "do not match"),
], ids=["missing", "too few", "rows"])  # fmt: skip
def test_cifar10_refuses_other_files(cifar10, tmp_path, capsys, changes, words):
    with pytest.raises(SystemExit):
        cifar10.main([str(write(tmp_path / "images.npz", **changes))])
    assert words in capsys.readouterr().err


def test_cifar10_refuses_what_is_no_archive(cifar10, tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.zeros(3))
    (tmp_path / "images.npz").write_bytes(b"PK\3\4 and no more")
    for name in ("images.npy", "images.npz", "none.npz"):
        with pytest.raises(SystemExit):
            cifar10.main([str(tmp_path / name)])
        assert name in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value", "least"), [
    ("--depth", 0, 1), ("--train", 0, 1), ("--test", -1, 1), ("--pooled-depth", 0, 1), ("--pooled-train", -1, 0),
    ("--pooled-test", 0, 1),
])  # fmt: skip
def test_cifar10_refuses_counts(cifar10, tmp_path, capsys, option, value, least):
    with pytest.raises(SystemExit):
        cifar10.main([str(write(tmp_path / "images.npz")), option, str(value)])
    assert f"argument {option}: must be at least {least}, got {value}" in capsys.readouterr().err
