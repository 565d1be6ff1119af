"""Entropy coding of arrays: each by whichever method makes it smallest.

`ans` codes the bytes of an array one by one by their frequencies (range ANS: many interleaved states
of 32 bits, words of 16, frequencies of 14), within a fraction of a per cent of their entropy; `lzma`
finds repetitions, in arrays whose bytes are put together by significance; `raw` is the array itself.
"""

import lzma

import numpy as np

_FREQUENCY = 14
_TOTAL = 1 << _FREQUENCY
_LOW = 1 << 16  # least state
_PER_LANE = 1 << 13  # symbols per interleaved state
_LANES = 1 << 11
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]
_LARGE = 1 << 24  # bytes beyond which repetitions are not looked for


def coded(array: np.ndarray) -> tuple[str, bytes]:
    """The method and the bytes. Inverse: `decoded`."""
    raw = np.ascontiguousarray(array).tobytes()
    found = {"raw": raw}
    if array.dtype.itemsize == 1 and array.size:
        found["ans"] = encode(np.frombuffer(raw, np.uint8))
    if 0 < len(raw) <= _LARGE and (array.dtype.itemsize > 1 or len(found["ans"]) < len(raw) / 2):
        planes = np.frombuffer(raw, np.uint8).reshape(-1, array.dtype.itemsize).T
        found["lzma"] = lzma.compress(planes.tobytes(), format=lzma.FORMAT_RAW, filters=_FILTERS)
    method = min(found, key=lambda name: len(found[name]))
    return method, found[method]


def decoded(method: str, data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array. Inverse of `coded`."""
    count = int(np.prod(shape))
    if method == "ans":
        return decode(data, count).view(dtype).reshape(shape)
    if method == "lzma":
        flat = lzma.decompress(data, format=lzma.FORMAT_RAW, filters=_FILTERS)
        planes = np.frombuffer(flat, np.uint8).reshape(dtype.itemsize, count)
        data = np.ascontiguousarray(planes.T).tobytes()
    elif method != "raw":
        raise ValueError(
            f"checkpoint: unknown coding {method!r}; it was written by a newer jaxprune"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def encode(symbols: np.ndarray) -> bytes:
    """Bytes by their frequencies. Inverse: `decode`."""
    frequency = _frequencies(np.bincount(symbols, minlength=256))
    start = np.cumsum(frequency) - frequency
    lanes = min(max(len(symbols) // _PER_LANE, 1), _LANES)
    steps = -(-len(symbols) // lanes)
    padded = np.full(steps * lanes, symbols[-1], np.uint8)
    padded[: len(symbols)] = symbols
    rows = padded.reshape(steps, lanes)
    state = np.full(lanes, _LOW, np.uint64)
    words: list[np.ndarray] = []
    f_of, s_of = frequency.astype(np.uint64), start.astype(np.uint64)
    limit = f_of << np.uint64(32 - _FREQUENCY)
    for row in rows[::-1]:
        f = f_of[row]
        over = state >= limit[row]
        words.append(state[over].astype(np.uint16))
        state = np.where(over, state >> np.uint64(16), state)
        whole, rest = np.divmod(state, f)
        state = (whole << np.uint64(_FREQUENCY)) + rest + s_of[row]
    top = int(symbols.max()) + 1
    head = np.array([top, lanes], np.uint16)
    parts = [head, frequency[:top].astype(np.uint16), state.astype(np.uint32), *words[::-1]]
    return b"".join(part.astype(part.dtype.newbyteorder("<")).tobytes() for part in parts)


def decode(data: bytes, count: int) -> np.ndarray:
    """The first `count` bytes. Inverse of `encode`."""
    top, lanes = (int(n) for n in np.frombuffer(data, "<u2", 2))
    stored = np.frombuffer(data, "<u2", top, 4).astype(np.uint64)
    # a frequency of all is 2^14, which 16 bits hold
    frequency = np.zeros(256, np.uint64)
    frequency[:top] = stored
    start = np.cumsum(frequency) - frequency
    symbol_at = np.repeat(np.arange(256, dtype=np.uint8), frequency.astype(np.int64))
    at = 4 + 2 * top
    state = np.frombuffer(data, "<u4", lanes, at).astype(np.uint64)
    words = np.frombuffer(data, "<u2", offset=at + 4 * lanes).astype(np.uint64)
    steps, place = -(-count // lanes), 0
    rows = np.empty((steps, lanes), np.uint8)
    for row in rows:
        slot = state & np.uint64(_TOTAL - 1)
        row[:] = symbol_at[slot.astype(np.int64)]
        state = frequency[row] * (state >> np.uint64(_FREQUENCY)) + slot - start[row]
        under = np.flatnonzero(state < _LOW)
        fresh = words[place : place + len(under)]
        state[under] = (state[under] << np.uint64(16)) | fresh
        place += len(under)
    return rows.reshape(-1)[:count]


def _frequencies(counts: np.ndarray) -> np.ndarray:
    """Counts scaled to a sum of 2^14, at least 1 for what occurs."""
    scaled = np.where(counts > 0, np.maximum(counts * _TOTAL // counts.sum(), 1), 0)
    while scaled.sum() != _TOTAL:  # take from, or give to, where it costs least
        if scaled.sum() > _TOTAL:
            loss = np.where(scaled > 1, counts / np.maximum(scaled, 1), np.inf)
            scaled[np.argmin(loss)] -= 1
        else:
            scaled[np.argmax(counts / np.maximum(scaled, 1) * (counts > 0))] += 1
    return scaled
