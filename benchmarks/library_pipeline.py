"""The original Any-Precision pipeline on the library it uses (flash1dkmeans), as the peer to compare with.

Per row, in a numba parallel loop over rows as the original runs it: argsort, prefix sums, weighted k-means at
the seed precision (k-means++ start, at most 50 rounds), then the library's two-cluster split of every cell up
to the top precision. Source: Any-Precision LLM (Park et al., ICML 2024) section 3; only the library is called,
nothing of the original's code is used.
"""

from __future__ import annotations

import numba
import numpy as np
from flash1dkmeans.k_cluster import numba_kmeans_1d_k_cluster
from flash1dkmeans.two_cluster import numba_kmeans_1d_two_cluster


@numba.njit(parallel=True, cache=True)
def library_pipeline(weights, sensitivity, seed_bits, max_bits, state):  # type: ignore[no-untyped-def]
    """weights, sensitivity f32[N, K] -> codes u8[N, K] and codebooks of seed_bits..max_bits, f32[N, 2^b] each."""
    rows, columns = weights.shape
    codes = np.empty((rows, columns), np.uint8)
    codebooks = [np.empty((rows, 2**b), np.float32) for b in range(seed_bits, max_bits + 1)]
    for row in numba.prange(rows):
        order = np.argsort(weights[row])
        x = weights[row][order]
        w = sensitivity[row][order].astype(np.float64)
        moment = x.astype(np.float64) * w
        w_sum, m_sum, q_sum = np.cumsum(w), np.cumsum(moment), np.cumsum(moment * x)
        centres, borders = numba_kmeans_1d_k_cluster(x, 2**seed_bits, 50, w_sum, m_sum, q_sum, 0, columns, state + row)
        codebooks[0][row] = centres
        for bits in range(seed_bits, max_bits):
            finer = np.empty(2 ** (bits + 1), np.float32)
            cuts = np.empty(2 ** (bits + 1) + 1, np.int32)
            cuts[-1] = borders[-1]
            for cell in range(2**bits):
                begin, end = borders[cell], borders[cell + 1]
                cuts[2 * cell] = begin
                if begin == end:
                    cuts[2 * cell + 1] = begin
                    finer[2 * cell] = finer[2 * cell + 1] = centres[cell]
                else:
                    halves, parts = numba_kmeans_1d_two_cluster(x, w_sum, m_sum, begin, end)
                    cuts[2 * cell + 1] = parts[1]
                    finer[2 * cell], finer[2 * cell + 1] = halves[0], halves[1]
            centres, borders = finer, cuts
            codebooks[bits + 1 - seed_bits][row] = centres
        for cell in range(2**max_bits):
            for place in range(borders[cell], borders[cell + 1]):
                codes[row, order[place]] = cell
    return codes, codebooks
