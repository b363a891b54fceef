"""`kvarn generate`: one prompt, streamed to the terminal or as one JSON object."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvarn.cli_model import open_llm
from kvarn.core.config import Resolved
from kvarn.core.errors import ConfigError
from kvarn.core.output import Output
from kvarn.core.request import Grammar, SamplingParams


@dataclass(slots=True)
class Asked:
    """Where the prompt comes from and how the answer goes out."""

    prompt: str | None
    file: str | None
    ids: str | None  #: token ids, separated by commas or spaces
    chat: bool
    as_json: bool


def split_words(
    words: list[str], file: str | None, ids: str | None
) -> tuple[str | None, str | None]:
    """(model, prompt) of `[MODEL] [PROMPT]`: a single word is the prompt unless it is elsewhere."""
    elsewhere = file is not None or ids is not None
    if file is not None and ids is not None:
        raise ConfigError("give the prompt by --file or by --ids, not both")
    if len(words) > (1 if elsewhere else 2):
        raise ConfigError(
            f"too many words: {' '.join(words[:4])!r}; a prompt of several words needs quotes"
        )
    if elsewhere:
        return (words[0] if words else None), None
    if len(words) == 2:
        return words[0], words[1]
    return None, (words[0] if words else None)


def grammar(
    json_schema: str | None, json_object: bool, regex: str | None, ebnf: str | None
) -> Grammar | None:
    """The constraint that the flags ask for; more than one is an error."""
    asked = [
        Grammar("json_schema", _text(json_schema)) if json_schema is not None else None,
        Grammar("json") if json_object else None,
        Grammar("regex", regex) if regex is not None else None,
        Grammar("ebnf", _text(ebnf)) if ebnf is not None else None,
    ]
    found = [one for one in asked if one is not None]
    if len(found) > 1:
        raise ConfigError("give one of --json-schema, --json-object, --regex and --ebnf")
    return found[0] if found else None


def _text(source: str) -> str:
    """The text itself, or of the file that @ names."""
    return _read(source[1:]) if source.startswith("@") else source


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _prompt(asked: Asked) -> str | list[int]:
    """The prompt from wherever it was given; stdin where nothing was said."""
    if asked.ids is not None:
        try:
            return [int(part) for part in asked.ids.replace(",", " ").split()]
        except ValueError:
            raise ConfigError(f"--ids must be token ids such as 1,2,3, not {asked.ids!r}") from None
    if asked.file is not None:
        return _read(asked.file)
    if asked.prompt is not None:
        return asked.prompt
    if sys.stdin.isatty():
        raise ConfigError('no prompt: try kvarn generate "The capital of France is"')
    return sys.stdin.read().rstrip("\n")


def run(resolved: Resolved, asked: Asked, params: SamplingParams) -> int:
    """Generate and print; 0 when the answer is complete."""
    prompt = _prompt(asked)
    with open_llm(resolved) as llm:
        stream = not asked.as_json and params.n == 1 and llm.tokenizer is not None
        show = _show if stream else None
        if asked.chat:
            if not isinstance(prompt, str):
                raise ConfigError("--chat needs a text, not token ids")
            completion = llm.chat([{"role": "user", "content": prompt}], params, on_output=show)
        else:
            completion = llm.generate([prompt], params, on_output=show)[0]
        if asked.as_json:
            print(json.dumps(_answer(completion, llm.engine.resolved.config.model)))
        elif stream:
            print()
        else:
            _print_all(completion, llm.tokenizer is not None)
    return 0


def _show(output: Output) -> None:
    sys.stdout.write(output.text)
    sys.stdout.flush()


def _print_all(completion: Any, as_text: bool) -> None:
    """Every sequence, where they cannot be streamed: several at once, or token ids."""
    for generation in completion.outputs:
        if len(completion.outputs) > 1:
            print(f"[{generation.index}]")
        print(generation.text if as_text else ",".join(map(str, generation.tokens)))


def _answer(completion: Any, model: str) -> dict[str, Any]:
    """What `--json` prints: the first sequence's fields, and every sequence under `choices`."""
    choices = [
        {
            "index": generation.index,
            "text": generation.text,
            "tokens": generation.tokens,
            "finish_reason": generation.finish,
            "stop": generation.stop,
            "logprobs": [asdict(entry) for entry in generation.logprobs]
            if generation.logprobs is not None
            else None,
        }
        for generation in completion.outputs
    ]
    n_prompt = len(completion.prompt_tokens)
    n_output = sum(len(choice["tokens"]) for choice in choices)
    first = choices[0]
    return {
        "id": completion.request_id,
        "model": model,
        "text": first["text"],
        "tokens": first["tokens"],
        "finish_reason": first["finish_reason"],
        "logprobs": first["logprobs"],
        "choices": choices,
        "prompt_tokens": completion.prompt_tokens,
        "usage": {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_output,
            "total_tokens": n_prompt + n_output,
            "prompt_tokens_details": {"cached_tokens": completion.n_cached},
        },
        "timings": {
            "queue_time_ms": completion.timings.queue * 1000,
            "time_to_first_token_ms": completion.timings.first_token * 1000,
            "total_time_ms": completion.timings.total * 1000,
        },
    }
