"""Small data sets without downloads, and transforms of pixels."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyroebm.core._checks import check_counts
from pyroebm.core.enumeration import all_bits
from pyroebm.core.rng import uniform

__all__ = [
    "LAPLACE_LOG_LIKELIHOOD",
    "Split",
    "bars_and_stripes",
    "dequantized",
    "digits",
    "image_patches",
    "laplace_mixture",
    "parity",
    "quantized",
]

#: Mean log-likelihood, in nats, of the distribution of :func:`laplace_mixture` with exact
#: whitening: minus the entropy of two Laplace variables of unit variance, 2 (1 + log 2b) with b = 1
#: / sqrt(2), since |det| = 1. That of a Gaussian is -log(2 pi e) = -2.83788.
LAPLACE_LOG_LIKELIHOOD = -2.0 - math.log(2.0)


class Split(NamedTuple):
    """Training and test data with labels, and how the pixels were binarized.

    Example:
        >>> data = digits()
        >>> data.train.shape, data.test.shape, data.binarization
        (torch.Size([1437, 64]), torch.Size([360, 64]), 'thresholded at 8')
    """

    train: Tensor  #: shape ``(N, d)``
    test: Tensor  #: shape ``(N', d)``
    train_labels: Tensor  #: int64, shape ``(N,)``
    test_labels: Tensor  #: int64, shape ``(N',)``
    #: "thresholded at t", "sampled once (seed s)" or "as given"; likelihoods can be compared only
    #: between data that were binarized in the same way
    binarization: str


def bars_and_stripes(side: int, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Return bars and stripes (MacKay, 2003): n x n images whose rows, or columns, are constant.

    Every pattern of rows and every pattern of columns occurs once, so the images of all ones and of
    all zeros occur twice. The largest possible mean log-likelihood is

    .. math:: -(n + 1) \log 2 + \frac{4}{2^{n+1}} \log 2

    Args:
        side: n, the side of the image in pixels, up to 16.
        dtype: floating-point type; None for torch's default.

    Returns:
        zeros and ones, shape ``(2**(n + 1), n * n)``.

    Raises:
        ValueError: if n is not from 1 to 16.

    Example:
        >>> bars_and_stripes(2).shape, bars_and_stripes(2).unique(dim=0).shape
        (torch.Size([8, 4]), torch.Size([6, 4]))
    """
    _check_bits("side", side)
    bits = all_bits(side, dtype=dtype)
    rows = bits.unsqueeze(2).expand(-1, side, side)
    return torch.cat([rows, rows.mT]).reshape(-1, side * side)


def parity(num_bits: int, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Return all vectors of n binary units with an even number of ones.

    The marginal distribution of fewer than n units is that of independent fair coins.

    Args:
        num_bits: n, up to 16.
        dtype: floating-point type; None for torch's default.

    Returns:
        zeros and ones, shape ``(2**(n - 1), n)``.

    Raises:
        ValueError: if n is not from 1 to 16.

    Example:
        >>> parity(3)
        tensor([[0., 0., 0.],
                [0., 1., 1.],
                [1., 0., 1.],
                [1., 1., 0.]])
    """
    _check_bits("num_bits", num_bits)
    bits = all_bits(num_bits, dtype=dtype)
    return bits[bits.sum(1) % 2 == 0]


def digits(threshold: float | None = 8, *, dtype: torch.dtype | None = None) -> Split:
    """Load scikit-learn's 8 x 8 digits (Alpaydin and Kaynak, 1998; 1,797 images, pixels 0 to 16).

    The split, 1,437 and 360, is scikit-learn's ``train_test_split`` with ``stratify=labels,
    random_state=42``. At the threshold 8, a model of independent pixels with the training
    frequencies has a mean test log-likelihood of -25.249 nats; for other splits of the same sizes
    it is between -24.8 and -25.4.

    Args:
        threshold: pixels of at least this value are 1, the others 0. None returns the pixels
            divided by 16.
        dtype: floating-point type; None for torch's default.

    Example:
        >>> digits().train.unique(), digits(threshold=None).binarization
        (tensor([0., 1.]), 'as given')
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=360, random_state=42, stratify=labels)
    train, test, train_labels, test_labels = (
        torch.from_numpy(np.ascontiguousarray(part)) for part in parts
    )
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if threshold is None:
        return Split(
            (train / 16.0).to(dtype), (test / 16.0).to(dtype), train_labels, test_labels, "as given"
        )
    how = f"thresholded at {threshold:g}"
    return Split(
        (train >= threshold).to(dtype),
        (test >= threshold).to(dtype),
        train_labels,
        test_labels,
        how,
    )


def laplace_mixture(
    num_samples: int = 100_000,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw a ZCA-whitened mixture of two independent Laplace sources (Bell and Sejnowski, 1997).

    .. math:: x = C^{-1/2} (A s - \overline{A s}), \qquad s_i \sim \mathrm{Laplace}(0, 1 / \sqrt 2)

    with A uniform on (-1, 1) entry by entry and C the sample covariance. It is a problem of
    independent component analysis, for Gaussian machines. Whitening leaves a rotation of s, so the
    mean log-likelihood of the distribution is ``LAPLACE_LOG_LIKELIHOOD``, -2 - log 2 = -2.69315
    nats, for any A.

    Args:
        num_samples: number of points.
        dtype: floating-point type; None for torch's default.
        generator: source of randomness; None for torch's default one.

    Returns:
        shape ``(n, 2)``, of mean 0 and covariance I.

    Raises:
        ValueError: if n < 3.

    Example:
        >>> laplace_mixture(1000, dtype=torch.float64).mT.cov().round(decimals=6).abs()
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    check_counts({"num_samples": 3}, num_samples)
    mixing = 2.0 * torch.rand(2, 2, dtype=torch.float64, generator=generator) - 1.0
    u = torch.rand(num_samples, 2, dtype=torch.float64, generator=generator) - 0.5
    sources = -u.sign() * torch.log1p(-2.0 * u.abs()) / math.sqrt(2.0)
    return whitened(sources @ mixing.mT).to(torch.get_default_dtype() if dtype is None else dtype)


def image_patches(
    num_patches: int = 10_000,
    side: int = 8,
    whiten: bool = True,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw random gray patches of scikit-learn's two photographs ("china", "flower"), from 0 to 1.

    Args:
        num_patches: number of patches.
        side: side of a patch, in pixels.
        whiten: whether to subtract the mean of each patch and whiten by ZCA. The direction of the
            mean remains without variance.
        dtype: floating-point type; None for torch's default.
        generator: source of the positions; None for torch's default one.

    Returns:
        shape ``(n, side * side)``.

    Raises:
        ValueError: if n or side is below 2, or side above 427.

    Example:
        >>> image_patches(100, side=4).shape
        torch.Size([100, 16])
    """
    from sklearn.datasets import load_sample_images

    check_counts({"num_patches": 2, "side": 2}, num_patches, side)
    gray = torch.stack(
        [
            torch.from_numpy(image.copy()).double().mean(2) / 255.0
            for image in load_sample_images().images
        ]
    )
    if side > min(gray.shape[1:]):
        raise ValueError(f"side must be at most {min(gray.shape[1:])}, got side={side}")
    windows = gray.unfold(1, side, 1).unfold(2, side, 1)
    positions = torch.randint(windows.shape[:3].numel(), (num_patches,), generator=generator)
    per_image = windows.shape[1:3].numel()
    image, position = positions // per_image, positions % per_image
    patches = windows[image, position // windows.shape[2], position % windows.shape[2]].reshape(
        num_patches, -1
    )
    if whiten:
        patches = whitened(patches - patches.mean(1, keepdim=True))
    return patches.to(torch.get_default_dtype() if dtype is None else dtype)


def whitened(x: Tensor) -> Tensor:
    r"""Whiten data by ZCA, :math:`C^{-1/2} (x - \bar x)` with the sample covariance C.

    Directions without variance remain 0.

    Args:
        x: data, shape ``(N, d)``.

    Returns:
        shape ``(N, d)``.
    """
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.mT.cov())
    varies = values > 1e-10 * values[-1]
    scales = torch.where(varies, values, 1.0).rsqrt() * varies
    return x @ (vectors * scales) @ vectors.mT


def dequantized(x: Tensor, num_levels: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Add uniform noise to gray levels, so that a density can be fitted to them.

    .. math:: y = (k + u) / K, \qquad x = k / (K - 1), \quad u \sim U[0, 1)

    On the levels themselves the likelihood of a density is unbounded (Theis, van den Oord and
    Bethge, "A Note on the Evaluation of Generative Models", 2016). :func:`quantized` is the
    inverse. A density p of y defines probabilities of levels, the integrals of p over the cells,
    and by Jensen's inequality

    .. math:: \log P(k) \ge E_u[\log p(y)] - d \log K

    Args:
        x: levels from 0 to 1 in steps of 1 / (K - 1), any shape; those of
            ``digits(threshold=None)`` have K = 17.
        num_levels: K, at least 2.
        generator: source of u; None for torch's default one. New noise in each epoch is better
            than the same noise in all.

    Returns:
        y in [0, 1), of the shape of x.

    Raises:
        ValueError: if ``num_levels`` < 2, or if an entry is not a level.

    Example:
        >>> y = dequantized(torch.tensor([0.0, 0.5, 1.0]), 3)
        >>> (3 * y).floor(), quantized(y, 3)
        (tensor([0., 1., 2.]), tensor([0.0000, 0.5000, 1.0000]))
    """
    check_counts({"num_levels": 2}, num_levels)
    k = (x * (num_levels - 1)).round()
    off = ~((x * (num_levels - 1) - k).abs() < 1e-3) | (k < 0) | (k > num_levels - 1)
    if bool(off.any()):
        raise ValueError(
            f"x must hold levels from 0 to 1 in steps of 1 / {num_levels - 1}, got"
            f" {x[off].flatten()[:5].tolist()}"
        )
    return (k + uniform(x.shape, generator, x.dtype, x.device)) / num_levels


def quantized(y: Tensor, num_levels: int) -> Tensor:
    """Return the gray levels, from 0 to 1, of the cells that contain y.

    This is the inverse of :func:`dequantized`. Values outside [0, 1) have the first or the last
    level.

    Args:
        y: values, any shape.
        num_levels: K, at least 2.

    Raises:
        ValueError: if ``num_levels`` < 2.

    Example:
        >>> quantized(torch.tensor([-0.1, 0.3, 0.4, 0.99]), 3)
        tensor([0.0000, 0.0000, 0.5000, 1.0000])
    """
    check_counts({"num_levels": 2}, num_levels)
    return (y * num_levels).floor().clamp(0, num_levels - 1) / (num_levels - 1)


def _check_bits(name: str, n: int) -> None:
    check_counts({name: 1}, n)
    if n > 16:
        raise ValueError(f"{name} must be at most 16, since all states are listed, got {name}={n}")
