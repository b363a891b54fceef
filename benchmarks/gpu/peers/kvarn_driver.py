"""Driver of kvarn."""

from typing import Any

from driver import Generate, run


def load(start: dict[str, Any]) -> tuple[Generate, dict[str, Any]]:
    """The engine with random weights and the options of the start."""
    import kvarn
    from kvarn import LLM, SamplingParams

    options: dict[str, Any] = {"prefix": "hash" if start["prefix"] else "none"}
    if start["fp8"]:
        options |= {"quantization": "fp8", "kv_dtype": "fp8"}
    llm = LLM(
        start["model"], load="random", device=start["device"], max_len=start["max_len"],
        max_seqs=start["max_seqs"], **options | start["options"],
    )  # fmt: skip

    def generate(prompts: list[list[int]], outputs: list[int], temperature: float) -> int:
        each = [
            SamplingParams(max_tokens=n, temperature=temperature, ignore_eos=True) for n in outputs
        ]
        return sum(len(done.outputs[0].tokens) for done in llm.generate(prompts, each))

    found = llm.engine.explain()
    chosen = {row["option"]: row["value"] for row in found["options"]}
    return generate, {
        "version": kvarn.__version__,
        "options": chosen,
        "startup": found["startup"],
    }


if __name__ == "__main__":
    run(load)
