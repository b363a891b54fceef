"""Driver of vLLM: dummy weights, its defaults for everything that the start does not say."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from driver import Generate, run

CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ENVIRON = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would be compiled at start
}
os.environ.update(ENVIRON)
import vllm  # noqa: E402


def folder(name: str, shape: dict[str, Any]) -> str:
    """A model folder that holds nothing but the shape."""
    path = Path(tempfile.gettempdir()) / f"shape-{name}"
    path.mkdir(exist_ok=True)
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = shape | ends | {
        "architectures": [CLASSES[shape["model_type"]]], "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def load(start: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """The engine with dummy weights."""
    options: dict[str, Any] = {}
    if start["fp8"]:
        options |= {"quantization": "fp8", "kv_cache_dtype": "fp8"}
    llm = vllm.LLM(
        folder(start["model"], start["shape"]), load_format="dummy", skip_tokenizer_init=True,
        dtype="bfloat16", max_model_len=start["max_len"], gpu_memory_utilization=0.9,
        enable_prefix_caching=start["prefix"], generation_config="vllm", disable_log_stats=True,
        **options | start["options"],
    )  # fmt: skip

    def generate(prompts: list[list[int]], outputs: list[int], temperature: float) -> int:
        each = [
            vllm.SamplingParams(
                temperature=temperature, max_tokens=n, ignore_eos=True, detokenize=False
            )
            for n in outputs
        ]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        done = llm.generate(asked, each, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)

    return generate, {"version": vllm.__version__, "options": options | start["options"]}


if __name__ == "__main__":
    run(load)
