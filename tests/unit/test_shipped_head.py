"""The head that comes with kvarn, on drafts about topics that nobody was trained on.

The records are 144 drafted tokens of SmolLM2's drafter, half of them the likeliest and half drawn:
its hidden states at them (8 bits), what it thought of them, and how far the target accepts them.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvarn.speculate.train.head import FILE, auc_of_rejection, binary_kl, load_head
from kvarn.speculate.train.load import shipped

RECORDS = Path(__file__).parents[1] / "data" / "acceptance_records.safetensors"


@pytest.fixture(scope="module")
def told() -> tuple[Tensor, Tensor]:
    """What the head says and what was accepted, [n] each."""
    folder = shipped("smollm2-135m")
    assert folder is not None and (folder / FILE).is_file()
    records = load_file(RECORDS)
    hidden = records["hidden"].float() * records["scale"].float().unsqueeze(1)
    head = load_head(folder, hidden.shape[1], torch.device("cpu"))
    kind = torch.arange(len(hidden)) // (len(hidden) // 2)
    return head.accepted(hidden, records["confidence"].float(), kind), records["accepted"].float()


def test_it_tells_rejections_from_acceptances(told: tuple[Tensor, Tensor]) -> None:
    said, accepted = told
    assert auc_of_rejection(said, accepted) > 0.7


def test_it_knows_more_than_the_share_that_is_accepted(told: tuple[Tensor, Tensor]) -> None:
    said, accepted = told
    constant = torch.full_like(accepted, accepted.mean().item())
    assert binary_kl(said, accepted) < binary_kl(constant, accepted)


def test_what_it_says_is_true_in_the_mean(told: tuple[Tensor, Tensor]) -> None:
    """Rejections weigh as much as acceptances, so that costs can be held against its word."""
    said, accepted = told
    assert said.mean().item() == pytest.approx(accepted.mean().item(), abs=0.1)
