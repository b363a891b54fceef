"""Micro-benchmark: python -m kvarn.kernels.linear.bench"""

import torch

from kvarn.kernels import native
from kvarn.kernels.linear import Mode, form_of, make_linear
from kvarn.kernels.linear.quantize import to_int4, to_int8
from kvarn.kernels.timing import compare


def bench() -> None:
    """The layers of SmolLM2-135M in bf16 at 1, 16 and 512 rows; weights come from memory."""
    for n, k in ((960, 576), (3072, 576), (576, 1536)):
        weights = [torch.randn(n, k).bfloat16() for _ in range(24)]
        modes: list[Mode] = ["plain", "packed"]
        modes += ["native"] if native.available() else []
        layers = {str(mode): [make_linear(w, None, mode) for w in weights] for mode in modes}
        for make in (to_int8, to_int4):
            quantized = [make(weight) for weight in weights]
            if form_of(quantized[0]) is not None:
                layers[make.__name__] = [make_linear(weight) for weight in quantized]
        for rows in (1, 16, 512):
            x = torch.randn(rows, k).bfloat16()
            forms = {
                mode: (lambda made=made, x=x: [layer(x) for layer in made])
                for mode, made in layers.items()
            }
            compare(f"24 x linear [{rows}, {k}] -> {n}", **forms)


if __name__ == "__main__":
    bench()
