"""Tile sizes of the Triton kernels. `python -m benchmarks.tune` rewrites this file on a GPU.

loss 16-bit 262144; score 16-bit 262144; score_backward 16-bit 262144: measured on NVIDIA H100 80GB HBM3, Triton
3.6.0, torch 2.11.0+cu130.

All others: Not yet measured on one: chosen on paper (one row a multiprocessor in flight where a row is large, so that
its second visit finds it in L2), checked for registers, spills and load width by `python -m benchmarks.compile_check`.
"""

# (op, bytes per element, largest V) -> (elements per tile, warps, stages). The last entry also serves all larger V.
TABLE: dict[tuple[str, int, int], tuple[int, int, int]] = {
    ("loss", 2, 1024): (1024, 1, 1),
    ("loss", 2, 16384): (4096, 4, 1),
    ("loss", 2, 65536): (8192, 16, 1),
    ("loss", 2, 262144): (32768, 32, 1),
    ("loss", 4, 1024): (512, 1, 1),
    ("loss", 4, 16384): (2048, 4, 1),
    ("loss", 4, 65536): (8192, 16, 1),
    ("loss", 4, 262144): (16384, 32, 1),
    ("score", 2, 1024): (1024, 1, 1),
    ("score", 2, 16384): (4096, 4, 1),
    ("score", 2, 262144): (16384, 8, 3),
    ("score", 4, 1024): (512, 1, 1),
    ("score", 4, 16384): (2048, 4, 1),
    ("score", 4, 262144): (2048, 4, 1),
    ("score_backward", 2, 1024): (1024, 1, 1),
    ("score_backward", 2, 16384): (4096, 4, 1),
    ("score_backward", 2, 262144): (32768, 16, 3),
    ("score_backward", 4, 1024): (512, 1, 1),
    ("score_backward", 4, 16384): (2048, 4, 1),
    ("score_backward", 4, 262144): (2048, 4, 1),
}
