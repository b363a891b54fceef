"""`RunnerFactory`: runners of one model with pools of any size; what a step takes, measured."""

from dataclasses import dataclass
from typing import Any

import torch

from kvarn.core.config import EngineConfig
from kvarn.core.errors import ConfigError
from kvarn.core.model import GroupSpec
from kvarn.kernels.attention import AttentionBackend
from kvarn.models.load import Model
from kvarn.runner.executor import Runner
from kvarn.runner.graphs import MOST_VERIFIED, CudaCapture, Graphs, buckets, verify_buckets
from kvarn.runner.memory import GRAPHS_BYTES, workspace_bytes
from kvarn.runner.pieces import Pieces
from kvarn.runner.pool import KVPool
from kvarn.runner.sampler import Sampler
from kvarn.runner.state import DeviceState
from kvarn.runner.warm import peak_bytes
from kvarn.sparse.rules import Rules

LOGIT_BYTES = 6  #: of a logit: as the product leaves it, and in fp32


@dataclass(slots=True)
class RunnerFactory:
    """Everything that a runner is made of but the pages."""

    config: EngineConfig
    model: Model
    groups: list[GroupSpec]
    backend: AttentionBackend
    sampler: Sampler
    kv_dtype: torch.dtype
    rules: Rules
    captured: (
        bool  #: the device keeps page tables and last tokens, and decode steps can be replayed
    )

    def runner(self, pages: list[int], max_len: int) -> Runner:
        """A runner with `pages` by group for sequences of at most `max_len` tokens."""
        config, model, device = self.config, self.model, self.model.device
        pool = KVPool(self.backend, self.groups, pages, config.page_size, self.kv_dtype, device)
        state, graphs, pieces = None, None, None
        if self.captured:
            width = -(-max_len // config.page_size) + 1
            state = DeviceState(config.max_seqs, len(self.groups), width, device)
        if state is not None and config.graphs == "on":
            capture = CudaCapture(device)
            pieces = Pieces(model.decoder, state, capture)
            backend: Any = self.backend
            sizes = buckets(config.max_seqs)
            verified = verify_buckets(self._judged()) if config.speculate != "none" else []
            graphs = Graphs(
                model.decoder, self.groups, pool, backend, state, sizes, capture, verified
            )
        return Runner(
            model.decoder,
            self.groups,
            pool,
            self.backend,
            self.sampler,
            config.page_size,
            config.max_seqs,
            state,
            graphs,
            pieces,
            config.synthetic_acceptance,
            config.deterministic,
            self.rules,
        )

    def workspace(self) -> int:
        """Memory of the largest step and of the graphs: measured on a GPU. [bytes]"""
        config, spec = self.config, self.model.spec
        most = min(config.max_seqs, config.budget)
        if self.model.device.type != "cuda":
            return workspace_bytes(config.budget, spec.hidden, spec.ffn, spec.vocab, most)
        longest = min(config.max_len or spec.max_len, spec.max_len, config.budget)
        pages = [-(-longest // config.page_size) for _ in self.groups]
        try:
            runner = self.runner(pages, longest)
            peak = peak_bytes(runner, config.budget, config.max_seqs, config.page_size, longest)
            peak += runner.selecting.remembered
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"a step of budget={config.budget} positions and max_seqs={config.max_seqs} "
                f"sequences does not fit beside the weights; lower budget or max_seqs ({error})"
            ) from None
        torch.cuda.empty_cache()
        if config.graphs == "on":
            peak += GRAPHS_BYTES
        if config.speculate != "none":  # logits of drafts, in eager steps and in captured ones
            drafts = max(0, self._judged() - most)
            captured = min(drafts, MOST_VERIFIED) if config.graphs == "on" else 0
            peak += (drafts + captured) * spec.vocab * LOGIT_BYTES
        return peak

    def _judged(self) -> int:
        """Most rows of a step that verifies drafts for everybody."""
        config = self.config
        return min(config.max_seqs * (config.draft_tokens + 1), config.budget)
