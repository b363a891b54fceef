"""Driver of transformers: transformers_driver.py FOLDER THREADS DTYPE. Static batches."""

import sys
from typing import Any

from driver import Burst, run


def load() -> tuple[Burst, dict[str, Any]]:
    """`generate` on equal-length prompts: no padding, so a static batch at its best."""
    import torch
    import transformers

    folder, threads, dtype = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()

    def burst(prompts: list[list[int]], n: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=n, min_new_tokens=n,
            )  # fmt: skip
        return (out.shape[1] - ids.shape[1]) * out.shape[0]

    return burst, {"version": transformers.__version__, "dtype": dtype}


if __name__ == "__main__":
    run(load)
