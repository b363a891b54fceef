"""A scripted engine with the real one's face, for tests of the protocol and of the processes.

Tokens are bytes (0..255) and three specials, so that texts can be read in a failing test. What an
engine does with a prompt is written in the prompt:

    say:TEXT|   generate TEXT, then end
    die!        the process kills itself after four tokens
    break!      a step raises an exception
    fail!       this request alone ends with an error
    slow        20 ms a step

Anything else is answered with the words of `REPLY`, over and over, up to max_tokens.
"""

import os
import re
import signal
import time
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from kvarn.core.config import Resolved
from kvarn.core.errors import ModelError, QueueFull
from kvarn.core.model import ModelSpec
from kvarn.core.output import EngineStats, FinishReason, Output, Timings
from kvarn.core.plan import TokenLogprobs
from kvarn.core.request import Request
from kvarn.core.validate import Limits, validate

REPLY = b"the mill turns and turns, "
BOS, EOS, TOOL = 256, 257, 258
SPECIALS = {BOS: "<s>", EOS: "</s>", TOOL: "<tool>"}
VOCAB = 259
PAGE = 16

SPEC = ModelSpec(
    family="fake", name="fake", n_layers=1, hidden=8, ffn=8, n_heads=1, n_kv_heads=1, head_dim=8,
    vocab=VOCAB, max_len=4096, eos_ids=(EOS,),
)  # fmt: skip


class FakeTokenizer:
    """Bytes as tokens."""

    vocab_size = VOCAB
    eos_ids = (EOS,)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return ([BOS] if add_special else []) + list(text.encode())

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        parts = []
        for special, group in _runs(ids):
            if not special:
                parts.append(bytes(group).decode(errors="replace"))
            elif not skip_special:
                parts += [SPECIALS[id] for id in group]
        return "".join(parts)

    def chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        lines = [f"{m['role']}: {m.get('content') or ''}\n" for m in messages]
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")


def _runs(ids: list[int]) -> list[tuple[bool, list[int]]]:
    runs: list[tuple[bool, list[int]]] = []
    for id in ids:
        if not runs or runs[-1][0] != (id > 255):
            runs.append((id > 255, []))
        runs[-1][1].append(id)
    return runs


@dataclass
class Running:
    """One sequence of a request."""

    request: Request
    index: int
    script: list[int]
    ends: bool  #: the script ends the sequence (else it is repeated up to the limit)
    tokens: list[int] = field(default_factory=list)
    sent: int = 0  #: bytes of whole characters given out
    admitted: float = 0.0
    first: float = 0.0

    @property
    def pages(self) -> int:
        return -(-(len(self.request.prompt) + len(self.tokens)) // PAGE)


class FakeEngine:
    """Gives every running sequence one token a step."""

    def __init__(self, resolved: Resolved) -> None:
        if resolved.config.model == "missing":
            raise ModelError("there is no model 'missing'; did you mean 'fake'?")
        self.resolved = resolved
        self.spec = SPEC
        self.tokenizer = FakeTokenizer()
        self.max_len = resolved.config.max_len or SPEC.max_len
        self.limits = Limits(VOCAB, self.max_len)
        self._waiting: list[Running] = []
        self._running: list[Running] = []
        self._stats = EngineStats(kv_pages=4096)
        self._seen: set[tuple[int, ...]] = set()

    def add(self, request: Request) -> None:
        validate(request, self.limits)
        if len(self._waiting) + request.sampling.n > self.resolved.config.max_queue:
            raise QueueFull("the queue is full; try again in 1 s", 1.0)
        text = self.tokenizer.decode(request.prompt)
        said = re.findall(r"say:([^|]*)\|", text)
        script = list(said[-1].encode()) if said else list(REPLY)
        for index in range(request.sampling.n):
            self._waiting.append(Running(request, index, script, bool(said)))

    def abort(self, request_id: str) -> None:
        for group in (self._waiting, self._running):
            for seq in [s for s in group if s.request.id == request_id]:
                group.remove(seq)
                self._count("abort")

    def _count(self, reason: str) -> None:
        self._stats.finished[reason] = self._stats.finished.get(reason, 0) + 1

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> list[Output]:
        self._admit()
        if any("slow" in self._prompt(s) for s in self._running):
            time.sleep(0.02)
        if self._running:
            self._stats.steps += 1
        outputs = [self._advance(seq) for seq in list(self._running)]
        return outputs

    def _prompt(self, seq: Running) -> str:
        return bytes(id for id in seq.request.prompt if id < 256).decode(errors="replace")

    def _admit(self) -> None:
        now = time.monotonic()
        while self._waiting and len(self._running) < self.resolved.config.max_seqs:
            seq = self._waiting.pop(0)
            seq.admitted = now
            self._running.append(seq)
            if seq.index == 0:
                self._stats.prompt_tokens += len(seq.request.prompt)

    def _advance(self, seq: Running) -> Output:
        request, prompt = seq.request, self._prompt(seq)
        output = Output(request.id, seq.index, n_prompt=len(request.prompt))
        if request.pooling is not None:
            output.embedding = [float(len(request.prompt)), float(sum(request.prompt)), 1.0]
            return self._end(seq, output, "stop")
        if "break!" in prompt:
            raise RuntimeError("the script says break!")
        if "fail!" in prompt:
            output.error = "the script says fail!"
            return self._end(seq, output, "error")
        if "die!" in prompt and len(seq.tokens) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._generate(seq, output)

    def _generate(self, seq: Running, output: Output) -> Output:
        sampling = seq.request.sampling
        if sampling.prompt_logprobs is not None and not seq.tokens:
            known = [self._logprob(id, sampling.prompt_logprobs) for id in seq.request.prompt]
            output.prompt_logprobs = [None, *known[1:]]
        if sampling.max_tokens == 0:
            return self._end(seq, output, "length")
        source = [*seq.script, EOS] if seq.ends else cycle(seq.script)
        token = next(islice(source, len(seq.tokens), None))
        seq.tokens.append(token)
        if len(seq.tokens) == 1:
            seq.first = time.monotonic()
        self._stats.output_tokens += 1
        output.tokens, output.n_output = [token], len(seq.tokens)
        if sampling.logprobs is not None:
            output.logprobs = [self._logprob(token, sampling.logprobs)]
        reason: FinishReason | None = None
        if token == EOS:
            reason, output.stop = "stop", EOS
        elif len(seq.tokens) >= self._limit(seq):
            reason = "length"
        whole = bytes(id for id in seq.tokens if id < 256).decode(errors="ignore")
        output.text, seq.sent = whole[seq.sent :], len(whole)
        for stop in sampling.stop:
            if whole.endswith(stop):
                reason, output.stop = "stop", stop
                output.text = output.text[: max(0, len(output.text) - len(stop))]
        output.timings = self._timings(seq)
        return self._end(seq, output, reason) if reason else output

    def _limit(self, seq: Running) -> int:
        room = self.max_len - len(seq.request.prompt)
        return min(room, seq.request.sampling.max_tokens or room)

    def _timings(self, seq: Running) -> Timings:
        arrival = seq.request.arrival
        return Timings(seq.admitted - arrival, seq.first - arrival, time.monotonic() - arrival)

    def _end(self, seq: Running, output: Output, reason: FinishReason) -> Output:
        self._running.remove(seq)
        self._count(reason)
        output.finish = reason
        return output

    def _logprob(self, token: int, alternatives: int) -> TokenLogprobs:
        others = [(id, -2.0) for id in range(65, 64 + alternatives)]
        return TokenLogprobs(token, -0.5, 1, [(token, -0.5), *others])

    def stats(self) -> EngineStats:
        self._stats.running, self._stats.waiting = len(self._running), len(self._waiting)
        self._stats.kv_pages_used = sum(seq.pages for seq in self._running)
        return self._stats

    def reset_prefix_cache(self) -> bool:
        return not self._running

    def explain(self) -> dict[str, Any]:
        return {"options": self.resolved.rows(), "capabilities": [], "memory": {}}

    def close(self) -> None:
        pass
