"""Print the fill and the CPU time of packing 20,000 pieces into rows, by distribution of their lengths.

python scripts/benchmark_packing.py [ROW_LENGTH ...]
"""

from __future__ import annotations

import sys
import time

import numpy as np

from mtptrain.data.packing import pack_pieces

PIECES = 20_000
DEFAULT_ROWS = (2_048, 32_768, 262_144)


def lengths(row_length: int) -> dict[str, np.ndarray]:
    """Return the lengths of the pieces by the name of their distribution; none is longer than a row."""
    random = np.random.default_rng(0)
    drawn = {
        "uniform, 2 to 199": random.integers(2, 200, PIECES),
        "log-normal, median 403, sigma 1.5": random.lognormal(6.0, 1.5, PIECES),
        "gamma, mean 800, shape 2": random.gamma(2.0, 400.0, PIECES),
        "uniform, 2 to the length of a row": random.integers(2, row_length + 1, PIECES),
        "just over half a row": random.integers(row_length // 2 + 1, row_length // 2 + 100, PIECES),
    }
    return {name: np.clip(values, 2, row_length).astype(int) for name, values in drawn.items()}


def main(row_lengths: list[int]) -> None:
    """Pack every distribution into rows of every length."""
    for row_length in row_lengths:
        for name, sizes in lengths(row_length).items():
            starts = np.cumsum([0, *sizes[:-1]]).tolist()
            pieces = list(zip(starts, sizes.tolist(), strict=True))
            begun = time.process_time()
            rows = pack_pieces(pieces, row_length)
            spent = time.process_time() - begun
            fill = sizes.sum() / (len(rows) * row_length)
            print(f"rows of {row_length}, {name}: fill {100 * fill:.1f} %, {spent:.2f} s", flush=True)


if __name__ == "__main__":
    main([int(one) for one in sys.argv[1:]] or list(DEFAULT_ROWS))
