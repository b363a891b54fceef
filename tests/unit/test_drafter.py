"""A drafter: training lowers the loss, and what is saved loads as what was trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError, ModelError
from kvarn.core.model import ModelSpec
from kvarn.models.decoder import Decoder
from kvarn.models.load import Model
from kvarn.models.random_weights import RandomWeights
from kvarn.speculate.train import corpus
from kvarn.speculate.train.acceptance import causal, measure
from kvarn.speculate.train.corpus import TOP, Sample
from kvarn.speculate.train.drafter import Schedule, distillation_loss, divergence, train
from kvarn.speculate.train.load import load_drafter, load_network, shipped
from kvarn.speculate.train.network import Network, from_target, save

SPEC = ModelSpec(
    family="llama", name="tiny", n_layers=3, hidden=48, ffn=64, n_heads=4, n_kv_heads=2,
    head_dim=12, vocab=97, max_len=512, norm_eps=1e-5, rope_theta=1e4, tie_embeddings=True,
)  # fmt: skip
WEIGHTS = RandomWeights(0, 0.0, torch.float32, "cpu")


def tiny_target(spec: ModelSpec = SPEC) -> Model:
    decoder = Decoder(spec, WEIGHTS, max_len=128)
    device = torch.device("cpu")
    return Model(spec, decoder, None, "random", torch.float32, device, decoder.weight_bytes, {})


@torch.no_grad()
def logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    states = decoder.forward(tokens, torch.arange(len(tokens)), causal(decoder.spec))
    return decoder.logits(states)


def tiny_samples(n: int = 8, greedy: bool = False) -> list[Sample]:
    """Texts of the tiny target with its own distributions, as the corpus keeps them."""
    target, made = tiny_target().decoder, list[Sample]()
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        tokens = torch.randint(0, SPEC.vocab, (4,), generator=generator)
        for _ in range(12 + i % 3):
            p = logits(target, tokens)[-1].softmax(0)
            drawn = torch.multinomial(p, 1, generator=generator)
            tokens = torch.cat((tokens, p.argmax(keepdim=True) if greedy else drawn))
        best = logits(target, tokens)[3:-1].log_softmax(1).topk(TOP)
        made.append(Sample(tokens, 4, best.indices, best.values))
    return made


def tiny_network() -> Network:
    return from_target(SPEC, WEIGHTS, [0, 2], 32)


def as_saved(network: Network) -> Network:
    """Its weights as a file holds them; the embedding is in no file."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.bfloat16())
    return network


def test_three_steps_lower_the_loss() -> None:
    network, samples = tiny_network(), tiny_samples()
    how = Schedule(epochs=3, batch=8, rate=1e-2, warmup=1, others=97)
    before = network.embed.clone()

    def loss() -> float:
        everyone = torch.Generator().manual_seed(1)
        with torch.no_grad():
            return distillation_loss(network, samples, 97, everyone).item()

    first = loss()
    done = train(network, samples, how)
    assert done.steps == 3 and done.tokens == 3 * sum(len(s.top) for s in samples)
    assert loss() < 0.95 * first
    assert torch.equal(network.embed, before)


def test_the_same_seed_trains_the_same_drafter() -> None:
    samples, how = tiny_samples(), Schedule(epochs=2, batch=4)
    losses = [train(tiny_network(), samples, how).losses for _ in range(2)]
    assert losses[0] == losses[1]


def test_divergence_is_zero_only_between_equals() -> None:
    p, q = (torch.randn(5, 40, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    p, q = p.log_softmax(1)[:, :TOP], q.log_softmax(1)[:, :TOP]
    assert torch.allclose(divergence(p, p), torch.zeros(5), atol=1e-6)
    assert bool((divergence(p, q) > 0).all())


def test_saved_and_loaded_drafter_says_the_same(tmp_path: Path) -> None:
    network, target = as_saved(tiny_network()), tiny_target()
    save(network, tmp_path, {"steps": 0})
    drafter = load_drafter(tmp_path, target)
    tokens = torch.arange(20) % SPEC.vocab
    with torch.no_grad():
        expected = network(tokens.unsqueeze(0))[0] @ network.embed.T
    assert torch.allclose(logits(drafter, tokens), expected, atol=1e-4)
    again = load_drafter(tmp_path, target)
    assert torch.equal(logits(again, tokens), logits(drafter, tokens))


def test_embedding_and_output_matrix_are_the_targets(tmp_path: Path) -> None:
    save(tiny_network(), tmp_path, {})
    target = tiny_target()
    drafter = load_drafter(tmp_path, target)
    assert drafter.embed is target.decoder.embed
    assert drafter.head is target.decoder.head
    assert drafter.weight_bytes < target.decoder.embed.nbytes + target.weight_bytes
    own = sum(p.numel() for p in tiny_network().parameters()) * 4
    assert own <= drafter.weight_bytes < 1.2 * own  # rows are padded for the compiled products
    assert (tmp_path / "model.safetensors").stat().st_size < own


def test_a_vocabulary_of_its_own_gives_the_same_logits_for_those_tokens(tmp_path: Path) -> None:
    target, tokens = tiny_target(), torch.arange(20) % SPEC.vocab
    network = as_saved(tiny_network())
    save(network, tmp_path / "all", {})
    network.drafts = torch.tensor([3, 5, 60, 96])
    save(network, tmp_path / "few", {})
    every, few = (logits(load_drafter(tmp_path / name, target), tokens) for name in ("all", "few"))
    assert few.shape == every.shape
    assert torch.allclose(few[:, network.drafts], every[:, network.drafts], atol=1e-4)
    others = torch.ones(SPEC.vocab, dtype=torch.bool).index_fill(0, network.drafts, False)
    assert bool(torch.isneginf(few[:, others]).all())
    with torch.no_grad():
        trained = load_network(tmp_path / "few", target)
        assert torch.allclose(trained.logits(trained(tokens[None])[0]), few, atol=1e-4)


@pytest.mark.parametrize("wrong", [[], [3, 97], [-1, 3]])
def test_a_vocabulary_that_the_target_lacks_is_refused(tmp_path: Path, wrong: list[int]) -> None:
    network = tiny_network()
    network.drafts = torch.tensor(wrong, dtype=torch.long)
    save(network, tmp_path, {})
    with pytest.raises(ModelError, match="no list of tokens below 97"):
        load_drafter(tmp_path, tiny_target())


def test_labels_are_what_the_target_says() -> None:
    target, whole = tiny_target().decoder, from_target(SPEC, WEIGHTS, [0, 1, 2], SPEC.ffn)
    texts = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]
    for sample, (prompt, wrote) in zip(corpus.labelled(whole, texts), texts, strict=True):
        assert sample.prompt == len(prompt) and sample.tokens.tolist() == prompt + wrote
        said = logits(target, sample.tokens)[len(prompt) - 1 : -1].log_softmax(1)
        assert torch.allclose(said.gather(1, sample.top), sample.logprobs, atol=0.02)
        assert torch.allclose(said.topk(TOP).values, sample.logprobs, atol=0.02)


def test_common_tokens_are_counted_where_the_target_wrote() -> None:
    top, said = torch.zeros(3, TOP, dtype=torch.long), torch.zeros(3, TOP)
    samples = [Sample(torch.tensor([9, 9, 9, 9, 4, 2, 4]), 4, top, said)]
    assert corpus.common(samples, 2, 10).tolist() == [2, 4]


@pytest.mark.parametrize("field, word", [("vocab", "vocabulary"), ("hidden", "hidden size")])
def test_a_drafter_of_another_model_is_refused(tmp_path: Path, field: str, word: str) -> None:

    save(tiny_network(), tmp_path, {})
    other = tiny_target(spec=replace(SPEC, **{field: 2 * getattr(SPEC, field)}))
    with pytest.raises(ConfigError, match=word):
        load_drafter(tmp_path, other)


def test_an_ordinary_model_is_no_drafter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="any other model"):
        load_drafter(tmp_path, tiny_target())


def test_layers_that_the_target_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match="among 0 to 2"):
        from_target(SPEC, WEIGHTS, [3], 32)


@pytest.mark.parametrize("greedy", [True, False])
def test_the_target_accepts_all_that_it_drafts_itself(greedy: bool) -> None:
    target = tiny_target().decoder
    found = measure(target, target, tiny_samples(greedy=greedy), greedy, longest=4)
    assert found.survival == pytest.approx([1.0] * 4)
    assert found.overlap == pytest.approx(1.0, abs=1e-5)


def test_acceptance_falls_along_the_chain(tmp_path: Path) -> None:
    save(tiny_network(), tmp_path, {})
    target = tiny_target()
    drafter = load_drafter(tmp_path, target)
    samples = tiny_samples(16)
    found = measure(target.decoder, drafter, samples, greedy=False, longest=4)
    assert 0 < found.overlap < 1
    assert found.survival == sorted(found.survival, reverse=True)
    # two estimates of one number: from what was drawn, and from the whole distributions
    assert found.survival[0] == pytest.approx(found.overlap, abs=0.1)
    assert found.by_position[0] == found.survival[0]


def test_shards_keep_samples(tmp_path: Path) -> None:
    samples = tiny_samples(3)
    corpus.write(tmp_path / "shard-0000.safetensors", samples)
    for kept, sample in zip(corpus.read(tmp_path), samples, strict=True):
        assert kept.tokens.equal(sample.tokens) and kept.prompt == sample.prompt
        assert kept.top.equal(sample.top)
        assert torch.allclose(kept.logprobs, sample.logprobs, atol=0.02)
    with pytest.raises(ConfigError, match="generate a corpus"):
        corpus.read(tmp_path / "nowhere")


def test_no_held_out_topic_is_trained_on() -> None:
    trained = set(corpus.items(corpus.TOPICS))
    assert not trained & set(corpus.items(corpus.HELD_OUT_TOPICS)) and len(trained) > 80


def test_shipped_drafter_belongs_to_the_default_model() -> None:
    assert shipped("gpt-17") is None
    folder = shipped(resolve({}).config.model)
    assert folder is not None
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size < 17 * 2**20
