"""Driver of OpenVINO GenAI: openvino_driver.py MODEL.gguf THREADS

It takes text only: each token id becomes one common word, which is about one token.
"""

import sys
from typing import Any

from driver import Burst, run

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
         "school", "state", "family", "student", "group", "country", "problem", "hand", "part",
         "place", "case", "week", "company", "system", "program", "question", "work", "number",
         "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact",
         "month", "lot", "right", "study", "book", "eye", "job", "word")  # fmt: skip


def load() -> tuple[Burst, dict[str, Any]]:
    """Continuous batching with prefix caching."""
    import openvino_genai

    path, threads = sys.argv[1:]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 2, True
    scheduler.max_num_batched_tokens = 512
    pipe = openvino_genai.LLMPipeline(
        path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=int(threads)
    )

    def burst(prompts: list[list[int]], n: int) -> int:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = n
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        pipe.generate([" ".join(WORDS[t % len(WORDS)] for t in ids) for ids in prompts], config)
        return len(prompts) * n

    return burst, {"version": openvino_genai.__version__}


if __name__ == "__main__":
    run(load)
