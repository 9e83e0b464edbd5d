"""What the machine can do at most: a short probe of memory bandwidth and of bf16 matrix multiplication.

python bench/limits.py --threads 2    one JSON line: {"stream_bytes_per_s": ..., "gemm_flop_per_s": ...}
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

_STREAM_BYTES = 512 << 20
"""Far more than any cache of today's CPUs."""
_GEMM_SIZE = 2048


def _fastest_s(work: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def stream_bytes_per_s() -> float:
    """Bytes read from memory a second: the better of a sum and of a matrix-vector product."""
    data = torch.ones(_STREAM_BYTES // 4).view(-1, 4096)
    vector = torch.ones(4096)
    return _STREAM_BYTES / min(_fastest_s(data.sum), _fastest_s(lambda: data @ vector))


def gemm_flop_per_s() -> float:
    """Floating-point operations a second of a square bf16 matrix product, by the better of two ways to ask for it."""
    left = torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(torch.bfloat16)
    right = torch.randn(_GEMM_SIZE, _GEMM_SIZE).to(torch.bfloat16)
    seconds = min(_fastest_s(lambda: left @ right), _fastest_s(lambda: torch.nn.functional.linear(left, right)))
    return 2.0 * _GEMM_SIZE**3 / seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    torch.set_num_threads(parser.parse_args().threads)
    print(json.dumps({"stream_bytes_per_s": stream_bytes_per_s(), "gemm_flop_per_s": gemm_flop_per_s()}))


if __name__ == "__main__":
    main()
