"""Data sets against their known numbers, and readers of a user's files: whole, damaged and missing
ones."""

from __future__ import annotations

import gzip
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lib.checks import mean_and_se, within_se
from torch import Tensor

from pyroebm.data import (
    LAPLACE_LOG_LIKELIHOOD,
    bars_and_stripes,
    digits,
    image_patches,
    laplace_mixture,
    load_binary,
    parity,
    read_idx,
)

F64 = torch.float64
# a file or folder of thresholded MNIST, for those who have it
MNIST = os.environ.get("PYROEBM_MNIST")


def independent_floor(train: Tensor, test: Tensor) -> float:
    """Mean log-likelihood of the test set under independent pixels of the training set's
    frequencies."""
    p = train.double().mean(0)
    return float(
        (torch.xlogy(test.double(), p) + torch.xlogy(1 - test.double(), 1 - p)).sum(1).mean()
    )


@pytest.mark.parametrize(("n", "ceiling"), [(2, -1.732868), (3, -2.59930), (4, -3.37909)])
def test_bars_and_stripes_have_their_ceiling(n: int, ceiling: float) -> None:
    data = bars_and_stripes(n, dtype=F64)
    patterns, counts = data.unique(dim=0, return_counts=True)
    share = counts.double() / len(data)
    assert float((share * share.log()).sum()) == pytest.approx(ceiling, abs=5e-6)
    assert -(n + 1) * math.log(2) + 4 / 2 ** (n + 1) * math.log(2) == pytest.approx(
        ceiling, abs=5e-6
    )
    images = patterns.reshape(-1, n, n)
    bars, stripes = (
        (images == images[:, :1]).all(2).all(1),
        (images == images[:, :, :1]).all(2).all(1),
    )
    assert bool((bars | stripes).all())
    assert counts[[0, -1]].tolist() == [2, 2]
    assert (counts == 2).sum() == 2


def test_parity_hides_in_all_bits_together() -> None:
    data = parity(3, dtype=F64)
    assert data.sum(1).tolist() == [0, 2, 2, 2]
    signs = 1 - 2 * parity(5, dtype=F64)
    assert torch.equal(signs.prod(1), torch.ones(16, dtype=F64))
    assert torch.equal(signs[:, :4].prod(1).sum(), torch.zeros((), dtype=F64))


def test_digits_have_their_floor() -> None:
    data = digits()
    assert data.train.shape == (1437, 64)
    assert data.test.shape == (360, 64)
    assert data.binarization == "thresholded at 8"
    assert independent_floor(data.train, data.test) == pytest.approx(-25.25, abs=0.005)
    assert torch.bincount(data.test_labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    grey = digits(threshold=None, dtype=F64)
    assert torch.equal((grey.train >= 0.5).float(), data.train)


def test_laplace_mixture_has_its_likelihood() -> None:
    """The whitened sources are a rotation of Laplace variables; under the rotation of least L1 norm
    the mean log-likelihood is that of the truth, and a Gaussian's is worse."""
    x = laplace_mixture(100_000, generator=torch.Generator().manual_seed(1), dtype=F64)
    torch.testing.assert_close(x.mT.cov(), torch.eye(2, dtype=F64))
    angles = torch.linspace(0, math.pi / 2, 181, dtype=F64)
    found = []
    for a in angles:
        turned = x @ torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]], dtype=F64)
        found.append((-math.sqrt(2.0) * turned.abs() - 0.5 * math.log(2.0)).sum(1))
    best = max(found, key=lambda terms: float(terms.mean()))
    mean, se = mean_and_se(best)
    within_se(mean, LAPLACE_LOG_LIKELIHOOD, se)
    assert pytest.approx(-2.69315, abs=5e-6) == LAPLACE_LOG_LIKELIHOOD
    gaussian = (-0.5 * (x**2).sum(1) - math.log(2 * math.pi)).mean()
    assert float(gaussian) == pytest.approx(-2.83788, abs=1e-4)
    assert torch.equal(
        laplace_mixture(10, generator=torch.Generator().manual_seed(2)),
        laplace_mixture(10, generator=torch.Generator().manual_seed(2)),
    )


def test_patches_are_white_but_for_their_mean() -> None:
    white = image_patches(2000, side=5, dtype=F64)
    values = torch.linalg.eigvalsh(white.mT.cov())
    torch.testing.assert_close(values, torch.tensor([0.0] + [1.0] * 24, dtype=F64))
    raw = image_patches(50, side=5, whiten=False)
    assert 0.0 <= float(raw.min()) < float(raw.max()) <= 1.0


# --------------------------------------------------------------------------------------------------
# Readers


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (n, 3, 2)), rng.integers(0, 10, n)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_a_folder_of_idx_files(folder: Path) -> None:
    data = load_binary(folder)
    raw = np.random.default_rng(0).integers(0, 256, (6, 3, 2)).reshape(6, 6)
    assert torch.equal(data.train, torch.from_numpy(raw > 127).float())
    assert data.test.shape == (4, 6)
    assert data.train_labels.shape == (6,)
    assert data.binarization == "thresholded at 127"
    (folder / "train-images-idx3-ubyte").rename(folder / "train-images.idx3-ubyte")
    assert torch.equal(load_binary(str(folder)).train, data.train)


def test_sampled_pixels_have_their_grey_levels_as_means(tmp_path: Path) -> None:
    levels = np.tile(np.array([[0, 51, 128, 255]], dtype=np.uint8), (20_000, 1))
    labels = np.zeros(20_000)
    np.savez(tmp_path / "grey.npz", x_train=levels, x_test=levels, y_train=labels, y_test=labels)
    data = load_binary(tmp_path / "grey.npz", threshold=None, dtype=F64)
    assert data.binarization == "sampled once (seed 0)"
    assert data.train[:, [0, 3]].unique(dim=0).tolist() == [[0.0, 1.0]]
    mean, se = mean_and_se(data.train[:, 1:3])
    within_se(mean, np.array([51, 128]) / 255.0, se)
    assert not torch.equal(data.train, data.test)


def test_grey_levels_of_any_type_of_number(tmp_path: Path) -> None:
    for dtype in (np.uint8, np.uint16, np.int64, np.float16):
        levels, labels = np.array([[0, 200]], dtype=dtype), np.zeros(1, dtype=dtype)
        np.savez(
            tmp_path / "grey.npz", x_train=levels, x_test=levels, y_train=labels, y_test=labels
        )
        assert load_binary(tmp_path / "grey.npz").train.tolist() == [[0.0, 1.0]]


def test_bits_are_taken_as_they_are(tmp_path: Path) -> None:
    bits, labels = np.array([[0, 1], [1, 1]], dtype=np.uint8), np.array([3, 4])
    names = {"train": bits, "valid": bits[:1], "test": bits}
    arrays = {f"{k}.data": v for k, v in names.items()} | {
        f"{k}.lbl": labels[: len(v)] for k, v in names.items()
    }
    np.savez(tmp_path / "bits.npz", **arrays)
    data = load_binary(tmp_path / "bits.npz")
    assert data.binarization == "as given"
    assert data.train.tolist() == [[0, 1], [1, 1], [0, 1]]
    assert data.train_labels.tolist() == [3, 4, 3]


@pytest.mark.skipif(MNIST is None, reason="PYROEBM_MNIST names no binary MNIST")
def test_binary_mnist_has_its_floor() -> None:
    data = load_binary(str(MNIST))
    assert data.train.shape == (60_000, 784)
    assert data.test.shape == (10_000, 784)
    train = data.train.double().mean(0)
    p = (train * 60_000 + 1) / 60_002  # some pixels are never on
    test = data.test.double()
    assert float(
        (torch.xlogy(test, p) + torch.xlogy(1 - test, 1 - p)).sum(1).mean()
    ) == pytest.approx(-205.85, abs=0.01)


def damage_nothing(folder: Path) -> Path:
    return folder / "absent"


def remove_one(folder: Path) -> Path:
    (folder / "t10k-images-idx3-ubyte").unlink()
    return folder


def cut_short(folder: Path) -> Path:
    file = folder / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-3])
    return folder


def cut_gzip(folder: Path) -> Path:
    file = folder / "train-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-12])
    return folder


def not_gzip(folder: Path) -> Path:
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(b"<html>")
    return folder


def not_idx(folder: Path) -> Path:
    (folder / "train-images-idx3-ubyte").write_bytes(b"<html>")
    return folder


def other_labels(folder: Path) -> Path:
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(5))))
    return folder


def other_pixels(folder: Path) -> Path:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((4, 2, 2))))
    return folder


def text_npz(folder: Path) -> Path:
    (folder / "a.npz").write_text("no")
    return folder / "a.npz"


def half_npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", x_train=np.zeros((2, 2)))
    return folder / "a.npz"


def empty_npz(folder: Path) -> Path:
    np.savez(
        folder / "a.npz",
        x_train=np.zeros((0, 2)),
        x_test=np.ones((1, 2)),
        y_train=np.zeros(0),
        y_test=np.zeros(1),
    )
    return folder / "a.npz"


def words_npz(folder: Path) -> Path:
    np.savez(
        folder / "a.npz",
        x_train=np.array([["a", "b"]]),
        x_test=np.ones((1, 2)),
        y_train=np.zeros(1),
        y_test=np.zeros(1),
    )
    return folder / "a.npz"


def pickled_npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", x_train=np.array([{"a": 1}], dtype=object))
    return folder / "a.npz"


def one_array(folder: Path) -> Path:
    np.save(folder / "a.npy", np.zeros(3))
    return folder / "a.npy"


def negative(folder: Path) -> Path:
    np.savez(
        folder / "a.npz",
        x_train=-np.ones((1, 2)),
        x_test=np.ones((1, 2)),
        y_train=np.zeros(1),
        y_test=np.zeros(1),
    )
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damage_nothing, "path must exist.*dataset-fashion-mnist"),
        (remove_one, "holds none of .*t10k-images-idx3-ubyte.gz"),
        (cut_short, "must have 52 bytes .* got 49"),
        (cut_gzip, "damaged or incomplete"),
        (not_gzip, "damaged or incomplete"),
        (not_idx, "must be an IDX file"),
        (other_labels, "6 training images have 5 labels"),
        (other_pixels, "6 pixels, test images 4"),
        (text_npz, "cannot be read as .npz"),
        (half_npz, "must hold one of .*x_test"),
        (pickled_npz, "cannot be read as .npz"),
        (empty_npz, "train must hold numbers"),
        (words_npz, "train must hold numbers"),
        (one_array, "with one array"),
        (negative, "gray levels from 0 to 255"),
    ],
)
def test_missing_and_damaged_files_are_named(
    folder: Path, spoil: Callable[[Path], Path], said: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){said}"):
        load_binary(spoil(folder))


def test_idx_of_any_shape(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    assert np.array_equal(read_idx(tmp_path / "a"), array)


@pytest.mark.parametrize(
    "call", [lambda: bars_and_stripes(0), lambda: bars_and_stripes(17), lambda: parity(0)]
)
def test_sizes_are_checked(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"(side|num_bits) must be"):
        call()
    with pytest.raises(ValueError, match="side must be"):
        image_patches(3, side=428)
    with pytest.raises(ValueError, match="num_samples must be"):
        laplace_mixture(1)
    assert "sklearn" in sys.modules
