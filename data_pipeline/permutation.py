"""A seeded random order of any number of items that costs no memory: position -> item in constant time.

A balanced Feistel network permutes the integers of 2h bits for any round function (Luby and Rackoff, 1988). Choosing
h so that 2^(2h) >= size and applying the network again while the result is outside [0, size) ("cycle walking", Black
and Rogaway, 2002) makes it a permutation of [0, size); as 2^(2h) < 4 * size, fewer than four passes are expected.
"""

import numpy as np

ROUNDS = 6
WORD = (1 << 64) - 1


def mix64[T: (int, np.ndarray)](value: T) -> T:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit integers that looks random.

    Of one integer, or of every element of an array of uint64.
    """
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """64-bit key from integers; the order of the parts matters."""
    key = 0
    for part in parts:
        key = mix64(key ^ mix64(part & WORD))
    return key


def permute(index: int, size: int, key: int) -> int:
    """Item at position `index` (0 <= index < size) in the random order of `size` items that `key` names."""
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    item = _feistel(index, half_bits, key)
    while item >= size:
        item = _feistel(item, half_bits, key)
    return item


def _feistel(value: int, half_bits: int, key: int) -> int:
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for round_number in range(ROUNDS):
        left, right = right, left ^ (mix64(key ^ mix64((right << 8) | round_number)) & mask)
    return (left << half_bits) | right
