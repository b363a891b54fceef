"""No Triton kernel is compiled after the start, whatever is served: a request would wait for it."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

#: a fresh process, for kernels that another test compiled would not be seen to be compiled here
PROGRAM = """
import json, random, sys
import triton
from kvarn import LLM, SamplingParams

late = []

def note(**about):
    late.append(about["fn"].name + ": " + about["repr"])

llm = LLM(**json.loads(sys.argv[1]))
triton.knobs.runtime.jit_post_compile_hook = note
rng = random.Random(0)
vocab = llm.engine.spec.vocab

def prompts(n, shortest, longest):
    return [[rng.randrange(vocab) for _ in range(rng.randint(shortest, longest))] for _ in range(n)]

def serve(asked, **how):
    llm.generate(asked, SamplingParams(max_tokens=6, ignore_eos=True, **how))

for n in range(1, 20):  # every small batch, greedy and drawn
    serve(prompts(n, 1, 40), temperature=float(n % 2))
serve(prompts(64, 1, 300), temperature=0.0)
for length in (1, 15, 16, 17, 32, 33, 64, 512, 1000, 1024, 1500, 3000):  # alone, long contexts
    serve(prompts(1, length, length), temperature=0.0)
document = prompts(1, 2500, 2500)[0]
serve([document + rest for rest in prompts(40, 1, 30)], temperature=0.0)  # shared prefixes
serve(prompts(5, 10, 2000), temperature=1.0, top_p=0.9)
serve(prompts(3, 10, 200), temperature=0.7, top_k=20, min_p=0.05)
serve(prompts(3, 10, 200), temperature=0.7, repetition_penalty=1.1)
print(json.dumps(late))
"""


@pytest.mark.parametrize("model", ["llama-3.2-1b", "smollm2-135m"])
@pytest.mark.parametrize("options", [{}, {"kv_dtype": "fp8"}, {"quantization": "fp8"}])
def test_no_kernel_is_compiled_while_requests_wait(model: str, options: dict[str, Any]) -> None:
    given = {"model": model, "load": "random", "device": "cuda", "max_len": 4096, "max_seqs": 64}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(given | {"kv_memory": 8} | options)],
        capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
