"""Driver of vLLM on the CPU: vllm_driver.py FOLDER THREADS DTYPE [eager]"""

import os
import sys
from typing import Any

from driver import Burst, run


def load() -> tuple[Burst, dict[str, Any]]:
    """`LLM.generate` with token-id prompts, prefix caching as it is by default."""
    folder, threads, dtype, *more = sys.argv[1:]
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{int(threads) - 1}")
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    import vllm

    llm = vllm.LLM(
        folder, dtype=dtype, max_model_len=2048, max_num_seqs=32, enforce_eager="eager" in more
    )

    def burst(prompts: list[list[int]], n: int) -> int:
        params = vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        done = llm.generate(asked, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    return burst, {"version": vllm.__version__, "dtype": dtype, "eager": "eager" in more}


if __name__ == "__main__":
    run(load)
