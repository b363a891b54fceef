"""The acceptance head: its labels, what it can learn, its file, and where its word goes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unit.test_drafter import tiny_network, tiny_samples

from kvarn.core.errors import ConfigError
from kvarn.speculate.train.head import (
    FILE,
    AcceptanceHead,
    Lesson,
    auc_of_rejection,
    binary_kl,
    calibrate,
    lesson,
    lessons,
    load_head,
    save_head,
    train_head,
    weighted_bce,
)


def test_labels_are_acceptance() -> None:
    """Greedy: 0 or 1; drawn: min(1, p / q), whose mean over many drafts is the overlap."""
    network, sample = tiny_network(), tiny_samples(1)[0]
    generator = torch.Generator().manual_seed(0)
    greedy = lesson(network, sample, True, generator, mixing=0.0)
    assert len(greedy.hidden) == len(sample.top)  # nothing is mixed in: every draft stands
    assert set(greedy.accepted.tolist()) <= {0.0, 1.0}
    drawn = [lesson(network, sample, False, generator, mixing=0.0) for _ in range(600)]
    mean = torch.stack([one.accepted for one in drawn]).mean(0)
    states = network(sample.tokens[:-1].unsqueeze(0))[0, sample.prompt - 1 :]
    q = (states @ network.embed.T).softmax(1).detach()
    p = torch.zeros_like(q).scatter(1, sample.top, sample.logprobs.exp())
    torch.testing.assert_close(mean, torch.minimum(p, q).sum(1), atol=0.07, rtol=0)


def test_mixed_text_counts_only_where_the_draft_stands() -> None:
    network, sample = tiny_network(), tiny_samples(1)[0]
    all_text = lesson(network, sample, True, torch.Generator().manual_seed(0), mixing=1.0)
    wrote = sample.tokens[sample.prompt :]
    states = network(sample.tokens[:-1].unsqueeze(0))[0, sample.prompt - 1 :]
    drafts = (states @ network.embed.T).argmax(1)
    assert len(all_text.accepted) == int((drafts == wrote).sum())


def separable(n: int = 64, seed: int = 0) -> list[Lesson]:
    """Acceptance is written in the first number of the hidden state; confidence says nothing."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        hidden = torch.randn(10, 8, generator=generator)
        made.append(Lesson(hidden, (hidden[:, 0] > 0).float(), torch.full((10,), 0.5)))
    return made


def test_it_learns_what_there_is_to_learn() -> None:
    head = train_head(separable(), epochs=20, batch=4, rate=1e-2)
    unseen = separable(seed=1)
    said = head.accepted(torch.cat([one.hidden for one in unseen]), torch.full((640,), 0.5))
    accepted = torch.cat([one.accepted for one in unseen])
    assert auc_of_rejection(said, accepted) > 0.98
    assert binary_kl(said, accepted) < 0.3


def test_weights_of_rejections_lower_what_it_says() -> None:
    blind = [Lesson(torch.zeros(10, 8), torch.tensor([1.0] * 5 + [0.0] * 5), torch.ones(10) / 2)]
    even, strict = (
        train_head(blind, weight=w, epochs=400, batch=1, rate=3e-2)
        .accepted(torch.zeros(1, 8), torch.ones(1) / 2)[0]
        .item()
        for w in (1.0, 6.0)
    )
    assert even == pytest.approx(1 / 2, abs=0.03)
    assert strict == pytest.approx(1 / 7, abs=0.03)


def test_loss_of_one_half_is_the_log_of_two() -> None:
    odds, accepted = torch.zeros(4), torch.tensor([0.0, 0.3, 0.6, 1.0])
    assert weighted_bce(odds, accepted, 6.0).item() == pytest.approx(0.6931, abs=1e-4)


def test_auc_counts_ties_half() -> None:
    accepted = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert auc_of_rejection(torch.tensor([0.1, 0.2, 0.3, 0.4]), accepted) == 1.0
    assert auc_of_rejection(torch.tensor([0.4, 0.3, 0.2, 0.1]), accepted) == 0.0
    assert auc_of_rejection(torch.ones(4), accepted) == 0.5
    assert auc_of_rejection(torch.tensor([0.1, 0.3, 0.3, 0.4]), accepted) == 7 / 8


def test_what_is_saved_is_what_loads(tmp_path: Path) -> None:
    head = train_head(lessons(tiny_network(), tiny_samples(4), 0), epochs=2, batch=4)
    with pytest.raises(ConfigError, match=r"train_drafter\.py head"):
        load_head(tmp_path, 48, torch.device("cpu"))
    save_head(head, tmp_path, {"texts": 4})
    found = load_head(tmp_path, 48, torch.device("cpu"))
    x = torch.randn(5, 48)
    own = torch.rand(5)
    torch.testing.assert_close(found(x, own), head(x, own), atol=2e-2, rtol=2e-2)
    with pytest.raises(ConfigError, match="another drafter"):
        load_head(tmp_path, 64, torch.device("cpu"))


def test_an_untrained_head_repeats_the_drafter() -> None:
    own = torch.tensor([0.1, 0.5, 0.9])
    assert AcceptanceHead(8).accepted(torch.randn(3, 8), own).tolist() == pytest.approx(
        own.tolist()
    )


def test_calibration_is_by_kind_and_repairs_what_is_wrong() -> None:
    """A head that is too sure of itself, for tokens of which the drawn ones stand half as often."""
    head = train_head(separable(), epochs=20, batch=4, rate=1e-2)
    head.out.weight.data *= 5.0
    likeliest = separable(seed=2)
    drawn = [Lesson(one.hidden, one.accepted / 2, one.confidence) for one in separable(seed=3)]
    calibrate(head, [likeliest, drawn])
    for kind, most in ((0, 1.0), (1, 0.5)):
        unseen = separable(seed=4)
        hidden = torch.cat([one.hidden for one in unseen])
        accepted = most * torch.cat([one.accepted for one in unseen])
        said = head.accepted(hidden, torch.full((640,), 0.5), kind)
        each = head.accepted(hidden, torch.full((640,), 0.5), torch.full((640,), kind))
        torch.testing.assert_close(said, each)
        assert said.mean().item() == pytest.approx(accepted.mean().item(), abs=0.05)
        assert binary_kl(said, accepted) < 0.1


def test_a_head_of_old_says_the_same_of_both_kinds(tmp_path: Path) -> None:
    head = train_head(separable(), epochs=2, batch=4)
    save_head(head, tmp_path, {})
    state = load_file(tmp_path / FILE)
    state |= {name: state[name][:1].contiguous() for name in ("out.weight", "out.bias")}
    save_file(state, tmp_path / FILE)
    found, hidden, own = (
        load_head(tmp_path, 8, torch.device("cpu")),
        torch.randn(5, 8),
        torch.rand(5),
    )
    torch.testing.assert_close(found.accepted(hidden, own), found.accepted(hidden, own, 1))
