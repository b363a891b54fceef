"""Putting an engine together: the model, the pages that fit beside it, the parts by name."""

import logging
import time
from dataclasses import dataclass, field
from platform import python_version
from typing import TYPE_CHECKING, Any

import torch

from kvarn import __version__
from kvarn.core.config import EngineConfig, Resolved
from kvarn.core.errors import ConfigError
from kvarn.core.model import GroupSpec, ModelSpec, shares_of
from kvarn.core.part import Cap, Part, find, solve
from kvarn.core.validate import Limits
from kvarn.engine.drafter import Drafter, load_drafter
from kvarn.engine.trainer import make_trainer
from kvarn.kernels import native
from kvarn.kernels.attention import small_layout
from kvarn.kernels.collective import ALONE, Collective
from kvarn.kv.sizing import bytes_of, pages_by_group, pages_for_bytes
from kvarn.models.fit import GIB, free_memory
from kvarn.models.load import Model, load
from kvarn.models.precision import choose_device
from kvarn.runner.executor import Executor, Runner
from kvarn.runner.factory import RunnerFactory
from kvarn.runner.grammar import GrammarCompiler
from kvarn.runner.graphs import MOST_LOGITS
from kvarn.runner.memory import Ledger
from kvarn.runner.sampler import Sampler
from kvarn.runner.warm import decode_step, every_kernel
from kvarn.schedule.build import build_control
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.sparse.part import Selector
from kvarn.sparse.rules import Rules, parse, split
from kvarn.speculate.build import NEED_DRAFTER, NEED_TREES, build_speculation, suffix_trees
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.speculation import Speculation

if TYPE_CHECKING:
    from kvarn.engine.steplog import StepLog

log = logging.getLogger("kvarn.engine")

KV_SHARE = {"cpu": 0.25, "cuda": 0.95}  #: of the free memory, where kv_memory is not given
DEVICE_CAPS = {"cpu": Cap.CPU_DEVICE, "cuda": Cap.CUDA_DEVICE}
#: what every engine gives, whatever its parts
BASE_CAPS = frozenset({Cap.PAGED_KV, Cap.TABLE_GROUPS, Cap.WINDOW_HOLES, Cap.STEP_TIMES})
KV_MOST_CPU = 4 * GIB  #: a laptop's memory is not ours alone


@dataclass(slots=True)
class Assembly:
    """Everything that an engine is made of."""

    model: Model
    control: ControlPlane
    runner: Executor
    grammars: GrammarCompiler | None
    limits: Limits
    ledger: Ledger
    parts: dict[str, type[Part]]  #: by kind
    capabilities: frozenset[Cap]
    step_log: "StepLog | None"  #: rank 0 alone decides, and so records
    speculation: Speculation | None  #: rank 0's as well
    rules: Rules  #: what stays of a request's KV
    seconds: dict[str, float] = field(default_factory=dict)  #: start-up, by stage
    ranks: list[dict[str, object]] = field(default_factory=list)  #: what each holds; one: nothing

    def explain(self, resolved: Resolved) -> dict[str, Any]:
        """What `kvarn explain` shows."""
        return {
            "options": resolved.rows(),
            "parts": [
                {
                    "kind": part.kind,
                    "name": part.name,
                    "paper": part.paper,
                    "needs": sorted(cap.name for cap in part.needs),
                    "gives": sorted(cap.name for cap in part.gives),
                    "regime": part.regime,
                }
                for part in self.parts.values()
            ],
            "capabilities": sorted(cap.name for cap in self.capabilities),
            "ranks": self.ranks,
            "execution": self._execution(resolved.config),
            "memory": self.ledger.rows(),
            "startup": [
                {"stage": stage, "seconds": round(seconds, 3)}
                for stage, seconds in self.seconds.items()
            ],
        }

    def _execution(self, config: EngineConfig) -> list[dict[str, str]]:
        """How a step runs here, and why not faster."""
        decoder = self.model.decoder
        drafts = [suffix_trees()] if config.speculate in NEED_TREES else []
        if self.model.device.type == "cuda":
            replayed = config.graphs == "on"
            how = "replayed from captured graphs" if replayed else "launched kernel by kernel"
            steps = {"what": "decode steps", "how": how, "why": f"graphs={config.graphs}"}
            drafts += [small_layout.told()] if replayed else []
            return [steps, *self._verifying(config), *self._selection(replayed), *drafts]
        apart = any(len(owners) > 1 for owners in shares_of(self.rules.groups).values())
        obstacle = decoder.obstacle or ("KV heads lie in several table groups" if apart else None)
        return [
            {
                "what": "layers",
                "how": "one operation at a time" if obstacle else "one compiled call",
                "why": obstacle or "every layer has a compiled form",
            },
            {
                "what": "kernels",
                "how": "compiled" if native.available() else "torch",
                "why": native.reason(),
            },
            *drafts,
        ]

    def _verifying(self, config: EngineConfig) -> list[dict[str, str]]:
        """On a GPU: how steps that verify drafts run."""
        graphs = getattr(self.runner, "graphs", None)
        if config.speculate == "none":
            return []
        if graphs is None:
            how, why = "launched kernel by kernel", f"graphs={config.graphs}"
        else:
            how = f"replayed from captured graphs up to {graphs.verified[-1]} rows"
            why = (
                "those with prompts, trees, or more rows are not; of those whose logits are looked "
                f"at (rules, logprobs, drawn drafts) only {MOST_LOGITS} rows are"
            )
        steps = {"what": "verify steps", "how": how, "why": why}
        proposer = self.speculation and self.speculation.proposer
        if not isinstance(proposer, DraftModel):
            return [steps]
        drafts, why = "made when it is known what they follow", proposer.obstacle
        if config.overlap != "on":
            why = why or f"overlap={config.overlap}"
        if not why:
            drafts = "begun behind the step that verifies those before"
            why = (
                "those that are drawn, of more than eight tokens, or looked at (rules, logprobs, "
                "length controls that stop within a round) are waited for"
            )
        return [steps, {"what": "drafts", "how": drafts, "why": why}]

    def _selection(self, replayed: bool) -> list[dict[str, str]]:
        """How steps on a GPU run whose rows choose pages."""
        part = parse(self.rules.default)
        if not isinstance(part, Selector):
            return []
        how, why = "launched kernel by kernel, all rows together", f"{part.name} scores in torch"
        if part.bounds and replayed:
            how = "replayed where all rows choose, by the bounds and from the same layer on"
            why = "a step of rows that see all, or of drafts and chunks, beside them is launched"
        elif part.bounds:
            why = "graphs=off"
        return [{"what": "steps whose rows choose pages", "how": how, "why": why}]


def assemble(resolved: Resolved, group: Collective = ALONE) -> Assembly:
    """Build every part of an engine; errors come before anything large is allocated.

    In a group of ranks every rank does this, in the same order.
    """
    config = resolved.config
    began = time.perf_counter()
    here = DEVICE_CAPS[choose_device(resolved).type]
    parts = _choose_parts(resolved, here)
    compiled = time.perf_counter() - began
    capabilities = solve(list(parts.values()), base=BASE_CAPS | {here})
    model = load(resolved, group=group)
    spec, device = model.spec, model.device
    seconds = {"kernels": compiled, **model.seconds}
    groups = split(model.decoder.spec.groups(), config.sparsity)
    captured = device.type == "cuda" and Cap.CAPTURE in parts["attention"].gives
    _choose_step(resolved, device, captured)
    _choose_threads(resolved)
    kv_kind = _choose_kv_dtype(resolved, model)
    grammars = None
    if model.tokenizer is not None and spec.eos_ids:
        grammars = GrammarCompiler.of(model.tokenizer, spec.eos_ids, spec.vocab)
    sampler = Sampler(spec.vocab, device, config.seed, grammars)
    rules = _choose_rules(config, spec, groups, group.ranks)
    backend = parts["attention"]()
    build = RunnerFactory(config, model, groups, backend, sampler, kv_kind, rules, captured)
    began = time.perf_counter()
    workspace = build.workspace()
    seconds["largest step"] = time.perf_counter() - began
    began = time.perf_counter()
    drafter = None
    if group.rank == 0 and config.speculate in NEED_DRAFTER:
        drafter = load_drafter(resolved, model)
    every = groups + (drafter.groups if drafter is not None else [])
    every_pages, ledger = _choose_pages(resolved, model, every, workspace, kv_kind.itemsize)
    pages, draft_pages = every_pages[: len(groups)], every_pages[len(groups) :]
    longest = min(config.max_len, spec.max_len)  # what a runner sees at once; streams go on
    runner = build.runner(pages, longest)
    seconds["kv cache"] = time.perf_counter() - began
    if runner.graphs is not None:
        seconds |= _warm_up(runner, config, pages, longest)
    step_log = _step_log(config, spec, groups, pages, str(device)) if group.rank == 0 else None
    control = build_control(
        groups,
        pages,
        config.page_size,
        config.scheduler,
        config.prefix,
        config.evict,
        Capacity(config.budget, config.max_seqs, config.max_len, config.max_queue),
        step_log,
        rules.keeps,
        rules.selects,
        rules.filters,
    )
    speculation = None
    if config.speculate != "none" and group.rank == 0:
        if drafter is None:
            speculation = build_speculation(config, None)
            speculation.captures = lambda: runner.captures
        else:
            backend = parts["attention"]()
            proposer = drafter.proposer(config, backend, kv_kind, captured, draft_pages)
            if group.ranks == 1 and runner.graphs is not None:
                proposer.target = runner  # captured steps take drafts that are being made
            speculation = _drafted_speculation(resolved, model, drafter, proposer, runner)
    limits = Limits(
        vocab=spec.vocab, max_len=config.max_len, has_tokenizer=model.tokenizer is not None
    )
    return Assembly(
        model,
        control,
        runner,
        grammars,
        limits,
        ledger,
        parts,
        capabilities,
        step_log,
        speculation,
        rules,
        seconds,
    )


def _drafted_speculation(
    resolved: Resolved, model: Model, drafter: Drafter, proposer: DraftModel, runner: Runner
) -> Speculation:
    """Speculation with a drafting model, and with who teaches it, if that is asked for."""
    config = resolved.config
    found = build_speculation(config, proposer)
    found.captures = lambda: runner.captures + proposer.runner.captures
    found.begin = proposer.begin
    if config.train_drafter != "off":
        trainer = make_trainer(resolved, model, drafter, proposer, runner)
        found.trainer = trainer
        found.listeners.append(trainer.hear)
    return found


def _choose_rules(
    config: EngineConfig, spec: ModelSpec, groups: list[GroupSpec], ranks: int
) -> Rules:
    """What stays of sequences and is read of them; what does not go together is an error here."""
    if ranks > 1 and any(found.heads for found in split(spec.groups(), config.sparsity)):
        raise ConfigError(
            f"sparsity={config.sparsity} puts KV heads into several table groups, which tp={ranks} "
            f"ranks do not have alike; use tp=1 or another part"
        )
    drafts = config.draft_tokens if config.speculate != "none" else 0
    rules = Rules(
        groups, config.page_size, config.sparsity, drafts, config.deterministic, config.max_len,
        spec.max_len,
    )  # fmt: skip
    if config.draft_shape == "tree":
        _check_trees(rules, spec.name)
    return rules


def _warm_up(
    runner: Runner, config: EngineConfig, pages: list[int], longest: int
) -> dict[str, float]:
    """Capture the first steps and compile what others launch; seconds by stage."""
    began = time.perf_counter()
    for n_seqs in (config.max_seqs, 1):  # the largest first: all graphs share its memory
        decode_step(runner, n_seqs)
    captured = time.perf_counter()
    if not every_kernel(runner, pages, config.budget, longest):
        log.warning("not every kernel is compiled yet: some requests will wait for one")
    return {"graphs": captured - began, "every kernel": time.perf_counter() - captured}


def _choose_parts(resolved: Resolved, here: Cap) -> dict[str, Any]:
    """The class of every part by kind; what is unknown or runs elsewhere is an error here."""
    config = resolved.config
    if config.attention == "auto":
        resolved.choose("attention", *_best_attention(config.deterministic, here))
    parts = {
        "scheduler": find("scheduler", config.scheduler),
        "attention": find("attention", config.attention),
    }
    if config.prefix != "none":
        parts["prefix"] = find("prefix", config.prefix)
        parts["evict"] = find("evict", config.evict)
    if config.sparsity != "none":
        parts["sparsity"] = find("sparsity", config.sparsity.partition(":")[0])
    if config.speculate != "none":
        parts["proposer"] = find("proposer", config.speculate)
        parts["draft-length"] = find("draft-length", config.draft_length)
    if config.train_drafter != "off":
        parts["trainer"] = find("trainer", "online-spec")
    elsewhere = parts["attention"].needs & (set(DEVICE_CAPS.values()) - {here})
    if elsewhere:
        wanted = next(iter(elsewhere))
        device = next(name for name, cap in DEVICE_CAPS.items() if cap is wanted)
        raise ConfigError(
            f"attention {config.attention!r} runs on device={device} only, and the device is "
            f"{config.device}; attention=auto takes one that fits"
        )
    if config.deterministic and Cap.BATCH_INVARIANT not in parts["attention"].gives:
        raise ConfigError(
            f"deterministic needs BATCH_INVARIANT, which attention {config.attention!r} does not "
            f"give; 'native' and 'invariant' do on device=cpu, 'triton-invariant' on device=cuda"
        )
    return parts


def _check_trees(rules: Rules, model: str) -> None:
    """Refuse trees where no step could verify them as such."""
    if any(group.window is not None for group in rules.groups):
        raise ConfigError(
            f"draft_shape=tree cannot serve {model}: a tree's rows share one view of what is "
            f"committed, and in sliding-window layers deeper rows see less; use draft_shape=chain"
        )
    if rules.default_selects:
        raise ConfigError(
            f"draft_shape=tree cannot run with sparsity={rules.default}, whose rows choose what "
            f"they see: use draft_shape=chain"
        )


def _best_attention(deterministic: bool, here: Cap) -> tuple[str, str, str]:
    """Name, source and reason of the attention backend, where the user left it to us."""
    if here is Cap.CUDA_DEVICE and deterministic:
        return "triton-invariant", "derived", "the same bits in any batch, on the GPU"
    if here is Cap.CUDA_DEVICE:
        return "triton", "device", "reads pages in place on the GPU"
    if native.available():
        return "native", "device", f"reads pages in place ({native.reason()})"
    if deterministic:
        return "invariant", "derived", "the same bits in any batch, in plain torch"
    return "cpu", "device", f"plain torch: {native.reason()}"


def _step_log(
    config: EngineConfig, spec: ModelSpec, groups: list[GroupSpec], pages: list[int], device: str
) -> "StepLog | None":
    """Where decisions are recorded, if anywhere; its first record says what decides."""
    if not config.step_log:
        return None
    from kvarn.engine.steplog import StepLog  # only who records needs its encoder

    write = StepLog(config.step_log)
    versions = {"kvarn": __version__, "python": python_version(), "torch": str(torch.__version__)}
    write(
        {
            "call": "begin", "format": 1, "versions": versions, "groups": groups, "pages": pages,
            "spec": spec, "device": device, "options": config,
        }
    )  # fmt: skip
    return write


def _choose_step(resolved: Resolved, device: torch.device, captured: bool) -> None:
    """Budget, overlap and graphs, where the user left them to us."""
    config = resolved.config
    if config.budget == 0:
        budget = 8192 if device.type == "cuda" else 512
        why = "a chunk that fills the device's matrix units without stalling decodes"
        resolved.choose("budget", max(budget, config.max_seqs), "device", why)
    if config.overlap == "auto":
        choice, why = "off", "planning and computing share the cores"
        if captured:
            choice, why = "on", "the GPU computes a step while the host plans the next"
        resolved.choose("overlap", choice, "device", why)
    if config.graphs == "on" and not captured:
        raise ConfigError(
            f"graphs=on needs a GPU and an attention part that gives CAPTURE; attention "
            f"{config.attention!r} on {device.type} is none; leave graphs=auto"
        )
    if config.graphs == "auto":
        why = "decode steps are replayed" if captured else "there is no GPU to replay them"
        resolved.choose("graphs", "on" if captured else "off", "device", why)


def _choose_kv_dtype(resolved: Resolved, model: Model) -> torch.dtype:
    """The number format of the KV cache."""
    if resolved.config.kv_dtype == "auto":
        return model.dtype
    if model.device.type != "cuda":
        raise ConfigError("kv_dtype=fp8 runs on a GPU only; leave it out on the CPU")
    return torch.float8_e4m3fn


def _choose_threads(resolved: Resolved) -> None:
    """CPU threads are torch's, and so of the whole process: engines in one process share them."""
    if resolved.config.threads:
        torch.set_num_threads(resolved.config.threads)
    else:
        resolved.choose("threads", torch.get_num_threads(), "device", "the cores that torch sees")


def _choose_pages(
    resolved: Resolved, model: Model, groups: list[GroupSpec], workspace: int, wide: int
) -> tuple[list[int], Ledger]:
    """Pages by group, the longest sequence that they allow, and the ledger.

    `workspace`: what a step takes beside weights and KV; `wide`: size of a number in the cache.
    """
    config, spec = resolved.config, model.spec
    size = config.page_size
    ranks = model.decoder.group
    free, total = free_memory(model.device, ranks.ranks)
    longest = min(config.max_len or spec.max_len, spec.max_len)  # of what is held of a sequence
    # more than this could never be used
    useful = config.max_seqs * (-(-longest // size) + 1)
    if config.pages == 0:
        given = config.kv_memory > 0
        bytes_ = config.kv_memory * GIB if given else _kv_share(model.device, free - workspace)
        pages = pages_for_bytes(groups, bytes_, size, wide, config.budget, config.max_seqs, useful)
        pages = ranks.least(pages)
        source = "derived" if given else "measured"
        why = f"{bytes_ / GIB:.2f} GiB for KV" + ("" if given else f" of {free / GIB:.2f} GiB free")
        resolved.choose("pages", pages, source, why)
    by_group = pages_by_group(groups, config.pages, size, config.budget, config.max_seqs)
    kv = bytes_of(groups, by_group, size, wide)
    ledger = Ledger(
        str(model.device), total, model.weight_bytes, kv, workspace, max(0, free - kv - workspace)
    )
    if kv + workspace > free:
        fit = pages_for_bytes(
            groups, free - workspace, size, wide, config.budget, config.max_seqs, useful
        )
        raise ConfigError(
            f"a KV cache of {config.pages} pages needs {kv / GIB:.2f} GiB beside "
            f"{workspace / GIB:.2f} GiB of workspace, and {free / GIB:.2f} GiB are free; "
            f"pages={fit} would fit"
        )
    _choose_max_len(resolved, spec, kv)
    return by_group, ledger


def _choose_max_len(resolved: Resolved, spec: ModelSpec, kv: int) -> None:
    """The longest sequence: what was asked, what the model can, what the pages hold."""
    config = resolved.config
    room = config.pages * config.page_size
    if room < 1:
        raise ConfigError("no memory is left for one KV page: raise kv_memory or lower max_seqs")
    if min(config.max_len, spec.max_len) > room:
        raise ConfigError(
            f"max_len={config.max_len} needs more than the {config.pages} KV pages "
            f"({kv / GIB:.2f} GiB) hold; max_len={room} would fit"
        )
    if config.max_len == 0:
        if room < spec.max_len:
            resolved.choose("max_len", room, "measured", f"all {config.pages} KV pages")
        else:
            resolved.choose("max_len", spec.max_len, "model", "the model's own limit")


def _kv_share(device: torch.device, free: int) -> float:
    share = max(0, free) * KV_SHARE[device.type]
    return min(share, KV_MOST_CPU) if device.type == "cpu" else share
