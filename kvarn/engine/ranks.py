"""An engine over several ranks: this process is rank 0, and starts the others."""

from dataclasses import replace

import torch

from kvarn.core.config import Resolved
from kvarn.core.errors import ConfigError, KvarnError
from kvarn.engine.assemble import Assembly, assemble
from kvarn.models.precision import choose_device, choose_dtype
from kvarn.models.shard import holding
from kvarn.runner.parallel import ParallelExecutor, Ranks


def on_ranks(resolved: Resolved) -> Assembly:
    """Assemble the same engine on every rank, and drive them all from here."""
    device = choose_device(resolved)
    _check_devices(resolved, device)
    choose_dtype(resolved, device)  # may be measured: once, for all
    by_rank = _options_by_rank(resolved, device)
    ranks = Ranks(resolved.config.tp)
    try:
        group = ranks.connect(by_rank, choose_device(resolved))
        assembly = assemble(resolved, group)
        ranks.await_ready()
    except Exception as error:
        reason = error if isinstance(error, KvarnError) else ranks.start_error(error)
        ranks.close()
        raise reason from None
    spec = assembly.model.spec
    assembly.runner = ParallelExecutor(assembly.runner, ranks)
    memory = [assembly.ledger.rows(), *(ready.memory for ready in ranks.ready)]
    for rank, rows in enumerate(memory):
        by_what = {f"{row['what']} (GiB)": row["gib"] for row in rows}
        holds = holding(spec, rank, group.ranks).row()
        assembly.ranks.append(holds | {"device": rows[0]["device"]} | by_what)
    return assembly


def _check_devices(resolved: Resolved, device: torch.device) -> None:
    ranks, there = resolved.config.tp, torch.cuda.device_count()
    if device.type == "cuda" and (device.index is not None or there < ranks):
        raise ConfigError(
            f"tp={ranks} takes one GPU a rank, from the first one on, with device=cuda; the device "
            f"is {device} and {there} are there; device=cpu has as many ranks as you like"
        )


def _options_by_rank(resolved: Resolved, device: torch.device) -> list[Resolved]:
    """The options of every rank: its own GPU, or its share of the CPU threads."""
    config, ranks = resolved.config, resolved.config.tp
    threads = config.threads or torch.get_num_threads()
    others = [Resolved(replace(config), dict(resolved.origins)) for _ in range(ranks - 1)]
    for rank, mine in enumerate([resolved, *others]):
        share = max(1, threads // ranks + (rank < threads % ranks))
        mine.choose("threads", share, "derived", f"{threads} shared by {ranks} ranks")
        if device.type == "cuda":
            mine.choose("device", f"cuda:{rank}", "derived", f"rank {rank}")
    return [resolved, *others]
