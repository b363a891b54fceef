"""The drafting model of an engine: loaded beside the target, with pages and a runner of its own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from kvarn.core.config import EngineConfig, Origin, Resolved
from kvarn.core.errors import ConfigError
from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.kernels.attention import AttentionBackend
from kvarn.kv.evict import Evict
from kvarn.kv.manager import KVManager
from kvarn.models.load import Model, load
from kvarn.models.quantized.convert import Kind
from kvarn.runner.chain import Chains
from kvarn.runner.drafting import BranchSampler, DraftSampler
from kvarn.runner.factory import RunnerFactory
from kvarn.sparse.rules import Rules
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.propose.draft_tree import WIDTH, DraftTree
from kvarn.speculate.train.head import load_head
from kvarn.speculate.train.load import load_drafter as load_shared
from kvarn.speculate.train.load import shares_embedding, shipped


@dataclass(slots=True)
class Drafter:
    """A model that drafts, before there are pages for it."""

    model: Model
    groups: list[GroupSpec]
    kind: Kind | None = None  #: of its own layers, where it shares the target's embedding

    def proposer(
        self,
        config: EngineConfig,
        attention: AttentionBackend,
        kv_kind: torch.dtype,
        captured: bool,
        pages: list[int],
    ) -> DraftModel:
        """The part, with `pages` by group."""
        device, vocab = self.model.device, self.model.spec.vocab
        draws = DraftSampler(vocab, device, config.seed)
        branches = BranchSampler(vocab, device, WIDTH) if config.draft_shape == "tree" else None
        build = RunnerFactory(
            config,
            self.model,
            self.groups,
            attention,
            branches or draws,
            kv_kind,
            Rules(self.groups, config.page_size),
            captured,
        )
        index: Any = None
        if config.prefix != "none":
            make: Any = find("prefix", config.prefix)
            windows = [group.window for group in self.groups]
            index = make(config.page_size, windows, cast(Evict, find("evict", config.evict)()))
        kv = KVManager(self.groups, pages, config.page_size, index)
        runner = build.runner(pages, config.max_len)
        if branches is not None:
            return DraftTree(runner, kv, config.budget, config.max_seqs, branches)
        drawn = draws if config.draft_choice == "drawn" else None
        head = None
        if config.draft_length == "specdec-pp":
            head = load_head(Path(config.draft_model), self.model.spec.hidden, device)
        chains = None
        if runner.graphs is not None:
            judge = None if head is None else head.captured(self.model.decoder.dtype)
            chains = Chains(runner.graphs, runner.image, judge)
        return DraftModel(runner, kv, config.budget, config.max_seqs, drawn, head, chains)


def _sharing(config: EngineConfig, folder: Path, target: Model) -> Drafter:
    """A drafter that was trained for the target, and uses its embedding and output matrix."""
    own = config.quantization if config.quantization in ("int8", "int4") else "none"
    kind = cast(Kind, own)
    decoder = load_shared(folder, target, quantization=kind, deterministic=config.deterministic)
    model = replace(target, spec=decoder.spec, decoder=decoder, source=str(folder))
    model.weight_bytes = decoder.weight_bytes
    return Drafter(model, decoder.spec.groups(), kind)


def load_drafter(resolved: Resolved, target: Model) -> Drafter:
    """The model that `draft_model` names, in the target's format; vocabularies agree."""
    config = resolved.config
    _choose_tokens(resolved)
    folder = Path(config.draft_model) if config.draft_model else shipped(config.model)
    if folder is None:
        raise ConfigError(
            f"speculate={config.speculate} needs draft_model: the name or folder of a small model "
            f"with the vocabulary of {target.spec.name}"
        )
    if shares_embedding(folder):
        resolved.choose("draft_model", str(folder), "derived", "it was trained for this model")
        return _sharing(config, folder, target)
    options = replace(config, model=config.draft_model, max_len=0, tp=1)
    own = Resolved(options, {name: Origin("derived") for name in resolved.origins})
    model = load(own)
    if model.spec.vocab != target.spec.vocab:
        raise ConfigError(
            f"draft_model {config.draft_model!r} has a vocabulary of {model.spec.vocab} tokens and "
            f"{target.spec.name} one of {target.spec.vocab}: a drafter must share the target's"
        )
    groups = model.decoder.spec.groups()
    if config.draft_shape == "tree" and any(group.window is not None for group in groups):
        raise ConfigError(
            f"draft_shape=tree needs a drafter without sliding-window layers, which "
            f"{model.spec.name} has: use draft_shape=chain"
        )
    return Drafter(model, groups)


def _choose_tokens(resolved: Resolved) -> None:
    """Drafts are drawn only where the verifier can be told what from."""
    config, why = resolved.config, ""
    if config.tp > 1:
        why = "ranks are told tokens only"
    elif config.draft_shape == "tree":
        why = "a tree is of the likeliest tokens"
    if not why or config.draft_choice != "drawn":
        return
    if resolved.origins["draft_choice"].source != "default":
        raise ConfigError(
            f"draft_choice=drawn hands distributions to the verifier, and {why}: use "
            f"draft_choice=likeliest, or tp=1 and draft_shape=chain"
        )
    resolved.choose("draft_choice", "likeliest", "derived", why)
