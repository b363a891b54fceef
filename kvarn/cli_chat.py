"""`kvarn chat`: talk to a model in the terminal, or line by line through a pipe.

In a terminal: streaming answers, line history, Ctrl-C stops the answer and not the program, a line
ending in a backslash goes on. On a pipe: each line of stdin is a message, each answer is printed.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

from kvarn.cli_options import convert
from kvarn.core.errors import ConfigError, RequestError, nearest
from kvarn.core.output import Output
from kvarn.core.request import SamplingParams

HELP = """\
/help            these lines
/params          sampling in force; /params temperature=0 max_tokens=200 changes it
/system TEXT     set the system message and start again; without TEXT show it
/reset           forget the conversation
/save FILE       write the conversation as JSON
/quit            leave (or Ctrl-D)
Ctrl-C           stop the answer; a line ending in \\ goes on"""


@dataclass(slots=True)
class Chat:
    """A conversation and how it is sampled."""

    llm: Any
    params: SamplingParams
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    say: Callable[[str], None] = print  #: remarks of the program, not of the model

    def prompt(self) -> list[dict[str, str]]:
        """Messages for the template, the system message first."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.messages

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Ask `text` and stream the answer; returns the line of figures to show after it.

        An interrupted answer stays in the conversation as far as it came; a question that the
        engine refuses does not.
        """
        self.messages.append({"role": "user", "content": text})
        said, n_tokens, first = "", 0, 0.0
        begin = time.perf_counter()

        def on_output(output: Output) -> None:
            nonlocal said, n_tokens, first
            first = first or time.perf_counter()
            said += output.text
            n_tokens += len(output.tokens)
            show(output.text)

        stopped, cached = "", None
        try:
            done = self.llm.chat(self.prompt(), self.params, on_output=on_output)
            cached = done.n_cached
            if done.outputs[0].finish == "length":
                stopped = ", stopped at the length limit"
        except KeyboardInterrupt:
            stopped = ", stopped by you"
        except RequestError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": said})
        end = time.perf_counter()
        speed = (n_tokens - 1) / (end - first) if n_tokens > 1 and end > first else 0.0
        wait = (first - begin) * 1000 if first else 0.0
        hits = f", {cached} prompt tokens cached" if cached else ""
        return f"{n_tokens} tokens, {speed:.1f} tok/s, first after {wait:.0f} ms{hits}{stopped}"

    def command(self, line: str) -> bool:
        """Carry out a line that begins with a slash; False to leave."""
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.say(HELP),
            "params": self._params,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
        }
        if name in ("quit", "exit"):
            return False
        if name not in commands:
            known = [f"/{known}" for known in (*commands, "quit")]
            raise ConfigError(f"unknown command /{name}{nearest('/' + name, known)}")
        commands[name](rest.strip())
        return True

    def _params(self, rest: str) -> None:
        hints = get_type_hints(SamplingParams)
        changes = {}
        for pair in rest.split():
            name, _, value = pair.partition("=")
            if name not in hints or name in ("grammar", "bad_word_ids"):
                raise ConfigError(f"unknown parameter {name!r}{nearest(name, hints)}")
            changes[name] = parse(name, value, hints[name])
        self.params = replace(self.params, **changes)
        default = SamplingParams()
        for each in fields(SamplingParams):
            value = getattr(self.params, each.name)
            if value != getattr(default, each.name) or each.name in ("temperature", "max_tokens"):
                self.say(f"{each.name} = {value}")

    def _system(self, rest: str) -> None:
        if rest:
            self.system = rest
            self.messages.clear()
        self.say(f"system: {self.system or '(none)'}")

    def _reset(self, rest: str) -> None:
        self.messages.clear()
        self.say("conversation forgotten")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save needs a file name")
        try:
            Path(rest).write_text(json.dumps({"messages": self.prompt()}, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {rest}: {error.strerror}") from None
        self.say(f"saved to {rest}")


def parse(name: str, text: str, hint: Any) -> Any:
    """A typed value of a sampling parameter; 'none' where the field may be None."""
    kinds = {str(kind): kind for kind in (int, float, bool)}
    plain = next((kind for kind in kinds.values() if hint in (kind, kind | None)), None)
    if text.lower() == "none" and hint is not plain:
        return None
    try:
        if plain is bool:
            return {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
        if plain is not None:
            return plain(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{name} must be of type {plain.__name__}, not {text!r}") from None  # type: ignore[union-attr]
    repeated = "dict" in str(hint) or "tuple[str" in str(hint)
    return convert(name, text.split(",") if repeated else text, hint)


def run(llm: Any, model: str, sampling: dict[str, Any], system: str | None) -> int:
    """Converse until the input ends; 0."""
    chat = Chat(llm, SamplingParams(**sampling), system)
    if llm.tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so it cannot chat")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return _terminal(chat, model) if terminal else _pipe(chat)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _pipe(chat: Chat) -> int:
    """One message a line, one answer after it; a refused message ends the program with 1."""
    for line in sys.stdin:
        text = line.rstrip("\n")
        if not text.strip():
            continue
        if text.startswith("/"):
            if not chat.command(text):
                break
            continue
        chat.answer(text, _show)
        print()
    return 0


def _terminal(chat: Chat, model: str) -> int:
    console = Console(highlight=False)
    chat.say = lambda text: console.print(text, style="dim", markup=False)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    console.print(f"[bold]{model}[/bold]  [dim]/help for commands, Ctrl-D to leave[/dim]")
    while True:
        try:
            text = _ask()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if not text.strip():
            continue
        try:
            if text.startswith("/"):
                if not chat.command(text):
                    return 0
                continue
            figures = chat.answer(text, _show)
            console.print(f"\n{figures}\n", style="dim", markup=False)
        except (ConfigError, RequestError) as error:
            console.print(str(error), style="red", markup=False)


def _ask() -> str:
    """A message from the keyboard; lines that end in a backslash go on."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("… "))
    return "\n".join(lines)
