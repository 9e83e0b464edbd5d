"""What the card does at most, measured: bytes from and to its memory, products in bfloat16 and fp8."""

import torch
from bench.gpu_timing import EventTimer

_COPY_BYTES = 2 << 30
_SIZE = 8192
_AT_MOST_S = 1.0


def bytes_per_s(timer: EventTimer) -> float:
    """The better of reading and of copying, of far more than the caches hold."""
    source = torch.ones(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    read = _COPY_BYTES / min(timer(source.sum, _AT_MOST_S))
    return max(read, 2 * _COPY_BYTES / min(timer(lambda: target.copy_(source), _AT_MOST_S)))


def flop_per_s(timer: EventTimer) -> dict[str, float]:
    """By numbers; of fp8 only where the card multiplies it."""
    a, b = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flop = 2.0 * _SIZE**3
    rates = {"bfloat16": flop / min(timer(lambda: a @ b, _AT_MOST_S))}
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
        one = torch.ones((), device="cuda")

        def multiply() -> torch.Tensor:
            return torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        rates["fp8"] = flop / min(timer(multiply, _AT_MOST_S))
    return rates
