"""The matrix that a residual stream is rotated by, and the two small ones that it is made of."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Channels of the second factor, a Hadamard matrix.
_SIZES = (64, 16, 4)


def rotation_sizes(width: int) -> list[int]:
    """The sizes of the second factor that a rotation of so many channels may have."""
    return [size for size in _SIZES if width % size == 0 and size < width]


def rotation_of_stream(width: int, seed: int = 0) -> Floats:
    """An orthogonal matrix [width, width] that leaves the vector of ones where it is.

    So the mean of a token's channels stays what it is, and a layer norm does what it did. It is the
    Kronecker product of a random matrix and a Hadamard one of 64, 16 or 4 channels, both of this
    kind, which FactorRotation makes use of; random alone where `width` is no multiple of 4.
    """
    sizes = rotation_sizes(width)
    if not sizes:
        return np.asarray(_random_rotation(width, seed), np.float32)
    size = sizes[0]
    return np.asarray(np.kron(_random_rotation(width // size, seed), _hadamard(size)), np.float32)


def _random_rotation(width: int, seed: int) -> Doubles:
    random = np.random.default_rng(seed)
    ones = np.full((width, 1), width**-0.5)
    # The first column of Q is the vector of ones, the others are a basis of what is left.
    basis = np.linalg.qr(np.hstack([ones, random.standard_normal((width, width - 1))]))[0][:, 1:]
    turn = np.linalg.qr(random.standard_normal((width - 1, width - 1)))[0]
    return np.asarray(ones @ ones.T + basis @ turn @ basis.T)


def _hadamard(size: int) -> Doubles:
    """A Hadamard matrix of a power of 4, each of whose rows adds up to one."""
    regular = (1 - 2 * np.eye(4)) / 2
    matrix: Doubles = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.asarray(np.kron(matrix, regular), np.float64)
    return matrix


def kronecker_factors(matrix: Floats) -> tuple[Floats, Floats] | None:
    """Square matrices whose Kronecker product is `matrix`; None where it is none of known sizes."""
    width = len(matrix)
    for size in rotation_sizes(width):
        parts = width // size
        # Each block of the product is the second factor times a number of the first.
        blocks = matrix.astype(np.float64).reshape(parts, size, parts, size).transpose(0, 2, 1, 3)
        flat = blocks.reshape(parts * parts, size * size)
        largest = flat[np.argmax(np.linalg.norm(flat, axis=1))]
        within = largest * np.sqrt(size) / np.linalg.norm(largest)
        across = flat @ within / (within @ within)
        if np.allclose(np.outer(across, within), flat, atol=1e-5):
            first, second = across.reshape(parts, parts), within.reshape(size, size)
            return np.asarray(first, np.float32), np.asarray(second, np.float32)
    return None
