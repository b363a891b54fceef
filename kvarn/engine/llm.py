"""`LLM`: the engine in a Python program. Prompts in, completions out; make as many as fit."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvarn.core.config import resolve
from kvarn.core.errors import RequestError
from kvarn.core.output import Output, Timings
from kvarn.core.plan import TokenLogprobs
from kvarn.core.request import PoolingKind, Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.engine.garbage import paced

Prompt = str | list[int]


@dataclass(slots=True)
class Generation:
    """One of a request's n sequences, whole."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None  #: stop, length, abort, error
    stop: int | str | None = None  #: the token or text that ended it
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None


@dataclass(slots=True)
class Completion:
    """What came of one prompt."""

    request_id: str
    prompt_tokens: list[int]
    outputs: list[Generation]
    n_cached: int = 0  #: prompt tokens taken from the prefix cache
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: list[float] | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def text(self) -> str:
        """The text of the first sequence."""
        return self.outputs[0].text


class LLM:
    """A model, ready to generate.

    >>> llm = LLM("smollm2-135m")
    >>> llm.generate("The capital of France is", SamplingParams(temperature=0))[0].text
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        """`options` are those of `EngineConfig`; `KVARN_*` variables stand behind them."""
        self.engine = Engine(resolve({"model": model, **options}, os.environ))
        self._serial = 0

    @property
    def spec(self) -> Any:
        """The model's shape."""
        return self.engine.spec

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None (random weights)."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_output: Callable[[Output], None] | None = None,
        sparsity: str | Sequence[str] | None = None,
    ) -> list[Completion]:
        """Continue each prompt (text or token ids); `on_output` sees every step's news.

        `sparsity`: what stays of the KV of these, or of each, where it is not what the engine was
        made with.
        """
        batch = _as_list(prompts)
        if params is None:
            params = SamplingParams()
        each = [params] * len(batch) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(batch):
            raise RequestError(f"{len(batch)} prompts but {len(each)} sampling parameters")
        rules = list(sparsity) if isinstance(sparsity, list | tuple) else [sparsity] * len(batch)
        if len(rules) != len(batch):
            raise RequestError(f"{len(batch)} prompts but {len(rules)} rules of sparsity")
        requests = [
            self._request(prompt, sampling=sampling, sparsity=rule)
            for prompt, sampling, rule in zip(batch, each, rules)
        ]
        return self._run(requests, on_output)

    def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        on_output: Callable[[Output], None] | None = None,
        **template: Any,
    ) -> Completion:
        """The assistant's answer to a conversation, through the model's chat template."""
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer, so it cannot chat")
        text = self.tokenizer.chat(messages, **template)
        ids = self.tokenizer.encode(text, add_special=False)
        request = self._request(ids, sampling=params or SamplingParams())
        return self._run([request], on_output)[0]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling: PoolingKind = "mean"
    ) -> list[list[float]]:
        """Unit vectors from the final hidden states."""
        requests = [self._request(p, pooling=pooling) for p in _as_list(prompts)]
        return [c.embedding or [] for c in self._run(requests, None)]

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def _request(self, prompt: Prompt, **fields: Any) -> Request:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: give token ids instead of text")
            ids: list[int] = self.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
        self._serial += 1
        return Request(id=f"llm-{self._serial}", prompt=ids, arrival=self.engine.clock(), **fields)

    def _run(
        self, requests: list[Request], on_output: Callable[[Output], None] | None
    ) -> list[Completion]:
        """Feed requests as the queue takes them, step until all are done; errors are raised."""
        done = {
            r.id: Completion(r.id, r.prompt, [Generation(i) for i in range(r.sampling.n)])
            for r in requests
        }
        engine = self.engine
        # as many as the queue could hold even if nobody ran
        room = max(1, engine.resolved.config.max_queue)
        todo = list(reversed(requests))
        open_sequences = 0
        try:
            with paced() as stepped:
                while todo or engine.has_work:
                    while todo and open_sequences + todo[-1].sampling.n <= max(
                        room, todo[-1].sampling.n
                    ):
                        request = todo.pop()
                        engine.add(request)
                        open_sequences += request.sampling.n
                    for output in engine.step():
                        _record(done[output.request_id], output)
                        open_sequences -= output.finish is not None
                        if on_output is not None:
                            on_output(output)
                    stepped()
        except BaseException:
            for request in requests:
                engine.abort(request.id)
            raise
        for completion in done.values():
            for generation in completion.outputs:
                if generation.error is not None:
                    raise RequestError(generation.error)
        return list(done.values())


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many? A list of ints is one."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]  # type: ignore[list-item]
    return items  # type: ignore[return-value]


def _record(completion: Completion, output: Output) -> None:
    generation = completion.outputs[output.index]
    generation.text += output.text
    generation.tokens += output.tokens
    if output.logprobs is not None:
        generation.logprobs = (generation.logprobs or []) + output.logprobs
    if output.prompt_logprobs is not None:
        completion.prompt_logprobs = output.prompt_logprobs
    if output.embedding is not None:
        completion.embedding = output.embedding
    if output.finish is not None:
        generation.finish, generation.stop = output.finish, output.stop
        generation.error = output.error
        completion.n_cached = max(completion.n_cached, output.n_cached)
        completion.timings = replace(output.timings)
