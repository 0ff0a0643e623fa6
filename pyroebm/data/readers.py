"""Readers of image files: MNIST in its usual layout, Debian's Fashion-MNIST, ``.npz``.

Nothing is downloaded.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyroebm.core.files import read_arrays, read_bytes
from pyroebm.core.rng import seeded_generator, uniform
from pyroebm.data.datasets import Split

__all__ = ["FASHION_MNIST", "load_binary", "read_idx"]

#: Folder of the files of Debian's package dataset-fashion-mnist.
FASHION_MNIST = Path("/usr/share/dataset/fashion-mnist")

#: The four files of MNIST; a dot may replace the hyphen before "idx", and they may be gzipped.
IDX = {
    "train": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
#: Names of arrays in an ``.npz``; validation data are appended to the training data.
NPZ = {
    "train": ("train.data", "x_train", "train_images", "train"),
    "valid": ("valid.data", "x_valid"),
    "test": ("test.data", "x_test", "test_images", "test"),
    "train_labels": ("train.lbl", "y_train", "train_labels"),
    "valid_labels": ("valid.lbl", "y_valid"),
    "test_labels": ("test.lbl", "y_test", "test_labels"),
}
HELP = (
    "Give a folder with MNIST's four files (train-images-idx3-ubyte and so on, gzipped or not),"
    " the folder of Debian's package"
    f" dataset-fashion-mnist ({FASHION_MNIST}), or an .npz with arrays x_train, x_test, y_train,"
    " y_test"
)


def load_binary(
    path: str | Path,
    threshold: float | None = 127,
    *,
    dtype: torch.dtype | None = None,
) -> Split:
    """Load images from files, and binarize them.

    Args:
        path: a folder of IDX files, or an ``.npz`` file (arrays ``x_train``, ``x_test``,
            ``y_train``, ``y_test``, or ``train.data``, ``valid.data`` and so on; ``valid`` is
            appended to ``train``).
        threshold: gray levels above this are 1, the others 0. None draws each pixel once, with
            probability level / 255 (Salakhutdinov and Murray, 2008), by the same random numbers
            in every call. Images of zeros and ones are not changed.
        dtype: floating-point type; None for torch's default.

    Raises:
        ValueError: if a file is missing, damaged or of another format.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     gray, labels = np.array([[0, 200], [130, 90]], dtype=np.uint8), np.array([0, 1])
        ...     np.savez(
        ...         f"{folder}/mine.npz", x_train=gray, x_test=gray, y_train=labels, y_test=labels
        ...     )
        ...     data = load_binary(f"{folder}/mine.npz")
        >>> data.train, data.binarization
        (tensor([[0., 1.],
                [1., 0.]]), 'thresholded at 127')
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"path must exist, got {str(path)!r}. {HELP}")
    arrays = _from_folder(path) if path.is_dir() else _from_npz(path)
    for part, array in arrays.items():
        if array.dtype.kind not in "buif" or not array.size:
            raise ValueError(
                f"{str(path)!r}: {part} must hold numbers, got shape {array.shape} of"
                f" {array.dtype}. {HELP}"
            )
    images = [
        x if x.dtype == np.uint8 else x.astype(np.float32)
        for x in (arrays["train"], arrays["test"])
    ]
    train, test = (torch.from_numpy(part.reshape(len(part), -1)) for part in images)
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"{str(path)!r}: training images have {train.shape[1]} pixels, test images"
            f" {test.shape[1]}"
        )
    labels = [
        torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64)).flatten()
        for part in ("train", "test")
    ]
    for pixels, classes, part in zip((train, test), labels, ("training", "test"), strict=True):
        if len(pixels) != len(classes):
            raise ValueError(
                f"{str(path)!r}: {len(pixels)} {part} images have {len(classes)} labels"
            )
    bits, how = _binarize([train, test], threshold)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    return Split(bits[0].to(dtype), bits[1].to(dtype), labels[0], labels[1], how)


def _binarize(images: list[Tensor], threshold: float | None) -> tuple[list[Tensor], str]:
    if all(bool(((part == 0) | (part == 1)).all()) for part in images):
        return images, "as given"
    top = max(float(part.max()) for part in images)
    if min(float(part.min()) for part in images) < 0.0 or not 1.0 < top <= 255.0:
        raise ValueError(
            f"images must hold gray levels from 0 to 255, or zeros and ones, got values up to"
            f" {top:g}"
        )
    if threshold is not None:
        return [part > threshold for part in images], f"thresholded at {threshold:g}"
    generator, cpu = seeded_generator(0), torch.device("cpu")
    return [
        uniform(x.shape, generator, torch.float32, cpu) < x / 255.0 for x in images
    ], "sampled once (seed 0)"


def _from_folder(folder: Path) -> dict[str, np.ndarray]:
    return {part: read_idx(_find(folder, name)) for part, name in IDX.items()}


def _find(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")
    names = [f"{spelling}{end}" for spelling in (name, dotted) for end in ("", ".gz")]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise ValueError(f"{str(folder)!r} holds none of {names}. {HELP}")


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, the format of MNIST, gzipped if its name ends in ``.gz``.

    Args:
        path: the file.

    Raises:
        ValueError: if it is missing or damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = Path(folder, "labels").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 5, 0, 4]))
        ...     read_idx(Path(folder, "labels"))
        array([5, 0, 4], dtype=uint8)
    """
    try:
        content = read_bytes(path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read ({error}): it is damaged or incomplete; download it"
            f" again. {HELP}"
        ) from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{str(path)!r} must be an IDX file of bytes, which starts with 00 00 08, got"
            f" {content[:4].hex(' ')}. {HELP}"
        )
    begin = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, begin, 4)]
    if len(content) != begin + math.prod(shape):
        raise ValueError(
            f"{str(path)!r} must have {begin + math.prod(shape)} bytes for an array of shape"
            f" {tuple(shape)}, got {len(content)}:"
            " it is damaged or incomplete; download it again"
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape).copy()


def _from_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        found, all_names = read_arrays(path, set().union(*NPZ.values()))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as .npz ({error}): it is damaged, or of another format."
            f" {HELP}"
        ) from error
    names = {
        part: next((name for name in choices if name in found), None)
        for part, choices in NPZ.items()
    }
    found = {part: found[name] for part, name in names.items() if name is not None}
    for part in ("train", "test", "train_labels", "test_labels"):
        if part not in found:
            raise ValueError(f"{str(path)!r} must hold one of {NPZ[part]}, got {all_names}. {HELP}")
    for part in ("train", "train_labels"):
        later = found.pop("valid" if part == "train" else "valid_labels", None)
        found[part] = found[part] if later is None else np.concatenate([found[part], later])
    return found
