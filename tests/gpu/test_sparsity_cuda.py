"""What stays and what is chosen on the GPU: steps equal the masked dense pass."""

from typing import Any

import pytest
import torch
from golden import test_head_groups, test_prompt_filter, test_selection, test_streams
from golden.naive import naive_generate
from golden.test_sparsity import ONE_SHOT, PROMPT, TEXT, generate, make_engine, masked_logits

from kvarn.core.request import Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_compaction_is_a_mask(tiny_folder: Any, name: str, graphs: str, overlap: str) -> None:
    engine = make_engine(
        tiny_folder("llama"), sparsity=f"{name}:budget=41{TEXT.get(name, '')}", device="cuda",
        graphs=graphs, overlap=overlap, prefix="none",
    )  # fmt: skip
    tokens, kept = generate(engine, PROMPT, 60)
    assert kept is not None
    logits = masked_logits(engine, PROMPT + tokens, kept)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    assert engine.control.check_integrity() == []
    engine.close()


@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_selection_is_a_mask(tiny_folder: Any, graphs: str, overlap: str) -> None:
    engine = make_engine(
        tiny_folder("llama"), sparsity="quest:budget=40,dense=1", device="cuda", graphs=graphs,
        overlap=overlap,
    )  # fmt: skip
    for _ in range(2):  # the second time with the first one's pages
        tokens, _ = generate(engine, PROMPT, 60)
        logits = test_selection.masked_logits(engine, PROMPT + tokens, len(PROMPT), 40, 1)
        assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    engine.close()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_heads_see_what_their_group_leaves(
    tiny_folder: Any, seed: int, graphs: str, overlap: str
) -> None:
    """Prompts in chunks, captured decode steps, and the pages of the first time."""
    engine = make_engine(
        tiny_folder("llama"), sparsity=test_head_groups.RULE.format(seed), device="cuda",
        graphs=graphs, overlap=overlap,
    )  # fmt: skip
    for _ in range(2):
        tokens, _ = generate(engine, PROMPT, 60)
        logits = test_head_groups.masked_logits(engine, PROMPT + tokens)
        assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    assert engine.control.check_integrity() == []
    engine.close()


@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("reuse", [3, 4])
def test_shared_choices_are_masks(tiny_folder: Any, graphs: str, overlap: str, reuse: int) -> None:
    engine = make_engine(
        tiny_folder("llama"), sparsity=f"quest:budget=40,dense=1,reuse={reuse}", device="cuda",
        graphs=graphs, overlap=overlap,
    )  # fmt: skip
    for _ in range(2):  # the second time with the first one's pages
        tokens, _ = generate(engine, PROMPT, 60)
        decoded = PROMPT + tokens
        logits = test_selection.masked_logits(engine, decoded, len(PROMPT), 40, 1, reuse)
        assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    engine.close()


@pytest.mark.parametrize(
    "rule",
    [
        f"{part}:budget=48,dense=1{reuse}"
        for part in ("quest", "random-pages")
        for reuse in ("", ",reuse=3")
    ],
)
def test_chosen_in_a_batch(tiny_folder: Any, rule: str) -> None:
    """Beside prompts in chunks and requests that see all: as alone."""
    engine = make_engine(tiny_folder("llama"), sparsity=rule, device="cuda", budget=48)
    alone = [generate(engine, PROMPT[: 70 + 20 * i], 30)[0] for i in range(4)]
    for i in range(4):
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        engine.add(Request(f"c{i}", PROMPT[: 70 + 20 * i], params))
        engine.add(Request(f"d{i}", PROMPT[5 : 60 + 30 * i], params, sparsity="none"))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for out in engine.step():
            found.setdefault(out.request_id, []).extend(out.tokens)
    assert [found[f"c{i}"] for i in range(4)] == alone
    engine.close()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_filtered_prompts(tiny_folder: Any, own: bool, overlap: str) -> None:
    """The choice is the CPU's, beside requests that see all; what goes on is a prompt as any."""
    rule = test_prompt_filter.RULE
    folder = tiny_folder("llama")
    host = test_prompt_filter.make_engine(folder)
    chosen = test_prompt_filter.dense_choice(host, PROMPT, 1)
    decoder = host.executor.decoder  # type: ignore[attr-defined]
    wanted = {
        "r": naive_generate(decoder, host.spec, [PROMPT[at] for at in chosen], 20),
        "d": naive_generate(decoder, host.spec, PROMPT[5:90], 20),
    }
    engine = test_prompt_filter.make_engine(
        folder, device="cuda", overlap=overlap, budget=48, **({"sparsity": rule} if own else {})
    )
    test_prompt_filter.add(engine, "d", PROMPT[5:90], sparsity="none")
    test_prompt_filter.add(engine, "r", PROMPT, sparsity=rule)
    assert test_prompt_filter.run(engine) == wanted
    engine.close()


@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_streams_beyond_what_the_model_knows(tiny_folder: Any, graphs: str, overlap: str) -> None:
    """Through many rounds of the ring, past the 512 positions of the tiny model."""
    engine = make_engine(
        tiny_folder("llama"), sparsity=test_streams.RULE, max_len=4096, device="cuda",
        graphs=graphs, overlap=overlap, prefix="none",
    )  # fmt: skip
    tokens, _ = generate(engine, PROMPT, 500)
    host = make_engine(tiny_folder("llama"), sparsity=test_streams.RULE, max_len=4096, device="cpu")
    logits = test_streams.ranked_logits(host, PROMPT + tokens, 24, 4, 24)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    engine.close()


@pytest.mark.parametrize("every", [1, 12])
def test_sums_that_go_on(tiny_folder: Any, every: int) -> None:
    """As without a GPU."""
    rule = f"h2o:budget=40,every={every}"
    engine = make_engine(tiny_folder("llama"), sparsity=rule, device="cuda", prefix="none")
    host = make_engine(tiny_folder("llama"), sparsity=rule, prefix="none", device="cpu")
    assert generate(engine, PROMPT, 50)[0] == generate(host, PROMPT, 50)[0]
    engine.close()
