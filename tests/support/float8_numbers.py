"""The numbers that FP8 E4M3 holds, spelled out, and the nearest of them."""

import math
from collections.abc import Iterator

from regcache.passes.float8 import LARGEST


def magnitudes() -> Iterator[float]:
    """The E4M3 numbers of bytes 0x00 to 0x7E: subnormal steps of 2 ** -9, then 8 to an octave."""
    for byte in range(0x7F):
        exponent, mantissa = divmod(byte, 8)
        yield math.ldexp(mantissa + (8 if exponent else 0), max(exponent, 1) - 10)


NUMBERS = list(magnitudes())


def nearest(value: float) -> float:
    """The E4M3 number nearest to a value, of two as near the one with the even byte."""
    size = min(abs(value), LARGEST)
    byte = min(range(len(NUMBERS)), key=lambda i: (abs(NUMBERS[i] - size), i % 2))
    return math.copysign(NUMBERS[byte], value)
