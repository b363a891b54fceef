"""`kvarn serve | chat | generate | bench | sim | parts | explain | pull`.

Commands import what they need when they run: `kvarn --help` loads no model code. Exit codes: 0
done, 1 failed, 2 wrong usage, 130 interrupted. What kvarn refuses is one line on stderr.
"""

import os
import sys
from difflib import SequenceMatcher
from typing import Annotated, Any

import typer

from kvarn import __version__
from kvarn.cli_bench import add_bench
from kvarn.cli_options import chosen, takes
from kvarn.cli_profile import add_profile
from kvarn.cli_replay import add_replay
from kvarn.cli_reproduce import add_reproduce
from kvarn.cli_sim import add_sim
from kvarn.core.config import EngineConfig
from kvarn.core.errors import ConfigError, KvarnError, RequestError
from kvarn.core.request import SamplingParams

#: sampling fields that no flag can hold: filled by the engine, or by --json-schema and its like
NO_FLAG = ("bad_word_ids", "grammar", "prompt_logprobs")
#: flags that take all words up to the next flag
SPREADING = ("--goodput", "--preset", "--form")

#: of click, or of the copy of it that typer carries
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
ClickError: type[typer.BadParameter] = typer.BadParameter.__mro__[2]

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="the same as --model")]
AsJSON = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `kvarn` program."""
    words = spread(list(sys.argv[1:] if argv is None else argv))
    try:
        code = build()(args=words or ["--help"], prog_name="kvarn", standalone_mode=False)
    except (ConfigError, RequestError) as error:
        return _fail(error, 2 if getattr(error, "status", 400) < 500 else 1)
    except KvarnError as error:
        return _fail(error, 1)
    except UsageError as error:
        return _fail(_usage(error), 2)
    except ClickError as error:
        return _fail(error.format_message(), 1)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code if isinstance(code, int) else 0


def spread(words: list[str]) -> list[str]:
    """`--goodput ttft:200 tpot:50` as `--goodput ttft:200 --goodput tpot:50`."""
    found: list[str] = []
    flag = None
    for word in words:
        if word.startswith("-"):
            flag = word if word in SPREADING else None
        elif flag is not None and found[-1] != flag:
            found.append(flag)
        found.append(word)
    return found


def _usage(error: typer.BadParameter) -> str:
    """What was wrong; an unknown flag or command is told the nearest that there is."""
    word = getattr(error, "option_name", None)
    if word is None or error.ctx is None:
        return error.format_message()
    known = [name for parameter in error.ctx.command.params for name in parameter.opts]
    close = max(known, key=lambda name: SequenceMatcher(None, word, name).ratio())
    return f"unknown option {word}; did you mean {close}?"


def _fail(error: object, code: int) -> int:
    text = " ".join(str(error).split())
    print(f"kvarn: {text}", file=sys.stderr)
    return code


def build() -> typer.Typer:
    """The program with all its commands."""
    app = typer.Typer(
        help="An LLM serving engine in which every technique is a swappable, measured part.",
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_version)
    for command in (_serve(), _chat(), _generate(), _explain(), _parts, _pull):
        app.command(command.__name__.strip("_"))(command)
    add_bench(app)
    add_profile(app)
    add_replay(app)
    add_reproduce(app)
    add_sim(app)
    return app


def _version(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        print(f"kvarn {__version__}")
        raise typer.Exit(0)


def _serve() -> Any:
    from kvarn.serve.options import ServeOptions

    @takes(engine=EngineConfig, server=ServeOptions)
    def serve(engine: dict[str, Any], server: dict[str, Any], name: Model = None) -> int:
        """Serve a model over the OpenAI API."""
        from kvarn.cli_model import fetch, tokenizer_of
        from kvarn.serve.main import serve as run

        resolved = chosen(engine, name)
        fetch(resolved.config)
        return run(resolved, ServeOptions(**server), tokenizer_of)

    return serve


def _chat() -> Any:
    @takes(
        engine=EngineConfig,
        sampling=SamplingParams,
        skip=(*NO_FLAG, "n", "logprobs", "logprobs_mode"),
        defaults={"max_tokens": 512, "temperature": 0.0},
    )
    def chat(
        engine: dict[str, Any],
        sampling: dict[str, Any],
        name: Model = None,
        system: Annotated[str | None, typer.Option(help="system message")] = None,
    ) -> int:
        """Talk to a model in the terminal; reads lines where stdin is no terminal."""
        from kvarn.cli_chat import run
        from kvarn.cli_model import open_llm

        resolved = chosen(engine, name)
        with open_llm(resolved) as llm:
            return run(llm, resolved.config.model, sampling, system)

    return chat


def _generate() -> Any:
    @takes(
        engine=EngineConfig,
        sampling=SamplingParams,
        skip=NO_FLAG,
        defaults={"max_tokens": 128, "temperature": 0.0},
    )
    def generate(
        engine: dict[str, Any],
        sampling: dict[str, Any],
        words: Annotated[
            list[str] | None, typer.Argument(metavar="[MODEL] [PROMPT]", help="default: stdin")
        ] = None,
        file: Annotated[str | None, typer.Option(help="read the prompt from a file")] = None,
        ids: Annotated[str | None, typer.Option(help="the prompt as token ids: 1,2,3")] = None,
        chat: Annotated[
            bool, typer.Option("--chat", help="ask through the model's chat template")
        ] = False,
        json_schema: Annotated[
            str | None, typer.Option(help="answer in JSON of this schema (text or @FILE)")
        ] = None,
        json_object: Annotated[bool, typer.Option("--json-object", help="answer in JSON")] = False,
        regex: Annotated[str | None, typer.Option(help="answer matches this expression")] = None,
        ebnf: Annotated[
            str | None, typer.Option(help="answer follows this grammar (text or @FILE)")
        ] = None,
        as_json: AsJSON = False,
    ) -> int:
        """Continue a prompt: an argument, a file, or stdin."""
        from kvarn import cli_generate as command

        name, prompt = command.split_words(words or [], file, ids)
        resolved = chosen(engine, name)
        grammar = command.grammar(json_schema, json_object, regex, ebnf)
        asked = command.Asked(prompt, file, ids, chat, as_json)
        return command.run(resolved, asked, SamplingParams(**sampling, grammar=grammar))

    return generate


def _explain() -> Any:
    @takes(engine=EngineConfig)
    def explain(engine: dict[str, Any], name: Model = None, as_json: AsJSON = False) -> int:
        """Print every option in force, its origin and why; parts, capabilities and memory."""
        from kvarn import cli_explain as command
        from kvarn.cli_model import open_llm

        with open_llm(chosen(engine, name)) as llm:
            command.print_explanation(llm.engine.explain(), as_json)
        return 0

    return explain


def _parts(as_json: AsJSON = False) -> int:
    """List every technique that can be switched on, and what it needs and gives."""
    from kvarn import cli_explain as command
    from kvarn.bench.part_results import results
    from kvarn.core.part import describe

    found = results()
    rows = [row | {"result": found.get((row["kind"], row["name"]))} for row in describe()]
    command.print_parts(rows, as_json)
    return 0


def _pull(
    model: Annotated[str, typer.Argument(help="smollm2-135m, or a hub id")] = "smollm2-135m",
) -> int:
    """Bring a model to this machine and print where it lies."""
    from kvarn.cli_model import pull_with_bar

    print(pull_with_bar(model))
    return 0


if __name__ == "__main__":
    sys.exit(main())
