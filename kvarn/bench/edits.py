"""Agents that have a file written again and again with small edits, played with a real model.

Three ways to ask for the same kind of thing, which differ in what a proposer can see of it:

- `conversations`: one chat, each turn one edit more; all earlier answers stand in the prompt.
- `patches`: every request is fresh, as of a service that applies edits: a system prompt, the
  original file, one edit. What came of other edits of the file is known from other requests only.
- `rewrites`: every request is fresh, as of a pipeline that generates a file from its description
  anew whenever one word of that changes, or a check failed: no file stands in the prompt.

A fresh request has the begin of its answer in it, the fence before a file, and ends at the fence
behind it: who uses files out of answers asks so. Greedy. What the model said is kept, whether it
did what it was asked or not. A file of which an answer did not end by itself is left out: most of
those go round in a loop, which any proposer drafts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from kvarn.core.errors import ConfigError
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM

OUTPUT = 320  #: tokens of an answer at most
TURNS = 3  #: of a conversation
VERSIONS = 4  #: fresh requests for one file

WORDS = (
    "alpha bravo cedar delta ember falcon grove harbor iris jasper kite lumen maple nectar onyx "
    "pearl quartz river sable tulip umber violet willow xenon yarrow zephyr"
)
KEYS = (
    "host_port timeout retries workers cache_size log_level queue_length batch_size page_limit "
    "max_users min_memory buffer_size upload_limit session_time backup_hours thread_count "
    "image_width image_height font_size margin_left margin_top zoom_level volume speed_limit "
    "score_limit lives start_level screen_width screen_height frame_rate"
)
SYSTEM = "You are a coding agent. Answer with one file, whole, and nothing else."
FENCE = "```"
#: descriptions of files, with the values of their two parameters; an edit changes one of these
TASKS = (
    ("a Python script that reads the file {0} and prints the average of its column {1}",
     ("sales.csv", "orders.csv"), ("price", "amount")),
    ("a Python class Stack with the methods push, pop and {0}; when it is empty, pop {1}",
     ("peek", "size"), ("returns None", "raises an IndexError")),
    ("an HTML page with the title {0}, a heading, and a form with a field for the {1}",
     ("Contact", "Newsletter"), ("name", "email")),
    ("a YAML file that configures a web server on port {0} with {1} workers",
     ("8080", "9090"), ("4", "16")),
    ("a Python function that tells whether a {0} is a palindrome, and a test of it with {1}",
     ("string", "number"), ("unittest", "pytest")),
    ("a shell script that makes a backup of the folder {0} and keeps the last {1} copies",
     ("/home", "/var/www"), ("5", "7")),
    ("an SQL file that creates a table {0} with an id, a name and a {1}",
     ("customers", "products"), ("date", "price")),
    ("a JSON file that describes a {0} with an id, a name, a {1} and a list of tags",
     ("book", "film"), ("year", "rating")),
    ("a Dockerfile for a Python {0} service that listens on port {1}",
     ("Flask", "FastAPI"), ("5000", "8000")),
    ("a README for a command line tool that converts {0} files to {1}",
     ("CSV", "XML"), ("JSON", "Markdown")),
    ("a Python script that prints the first {0} {1} numbers",
     ("10", "20"), ("prime", "Fibonacci")),
    ("a CSS file for a page with a {0} background, a {1} menu and round buttons",
     ("white", "dark"), ("left", "top")),
    ("a Python function that returns the {0} of a list of numbers, with a docstring in {1}",
     ("median", "mean"), ("English", "French")),
    ("a JavaScript function that checks whether {0} is valid and returns {1}",
     ("an email address", "a phone number"), ("true or false", "a message")),
    ("a Makefile with the targets build, test and {0} for a program in {1}",
     ("clean", "install"), ("C", "Go")),
    ("an INI file for a {0} database with a host, a port and {1}",
     ("MySQL", "Postgres"), ("a user", "a timeout")),
    ("a Python class {0} with the fields name, age and {1} and a method that prints them",
     ("Person", "Employee"), ("city", "salary")),
    ("a C program that reads {0} numbers and prints their {1}",
     ("two", "three"), ("sum", "product")),
    ("a SQL query that lists the {0} with the highest {1}",
     ("customers", "products"), ("price", "number of orders")),
    ("a Python script that counts the {0} of the file {1}",
     ("words", "lines"), ("input.txt", "notes.txt")),
    ("a crontab line that runs {0} every day at {1}",
     ("backup.sh", "cleanup.sh"), ("02:00", "23:30")),
    ("a Java class {0} with a private field {1}, a constructor, a getter and a setter",
     ("Account", "Product"), ("balance", "price")),
    ("an nginx configuration that serves the folder {0} on port {1}",
     ("/var/www/html", "/srv/site"), ("80", "8080")),
    ("a GitHub workflow that runs {0} on every {1}",
     ("pytest", "ruff"), ("push", "pull request")),
)  # fmt: skip
ORDER = ((0, 0), (0, 1), (1, 1), (1, 0))  #: values of the parameters, by version


@dataclass(slots=True)
class Turn:
    """One request, and what the model said."""

    prompt: list[int]
    answer: list[int]


Agent = list[Turn]  #: the requests for one file, in the order in which they come


# files and their edits


def settings_file(chance: Random) -> str:
    """Names and numbers."""
    names = chance.sample(KEYS.split(), 20)
    return "\n".join(f"{name} = {chance.randint(2, 999)}" for name in names)


def options_file(chance: Random) -> str:
    """The same as in YAML."""
    return settings_file(chance).replace(" = ", ": ").replace("_", "-")


def code_file(chance: Random) -> str:
    """Functions of one line."""
    parts, words = list[str](), WORDS.split()
    for name, given in zip(chance.sample(words, 6), chance.sample(words, 6)):
        about = f'    """Return the {name} of {given}."""'
        parts.append(f"def {name}({given}):\n{about}\n    return {given} * {chance.randint(2, 99)}")
    return "\n\n".join(parts)


FILES = (settings_file, options_file, code_file)


def edit(chance: Random, text: str) -> str:
    """What the user wants: another number at the end of a line."""
    old = chance.choice([line.strip() for line in text.split("\n") if line[-1:].isdigit()])
    new = re.sub(r"\d+$", str(chance.randint(100, 999)), old)
    return f"Change the line `{old}` to `{new}`. Write the whole file again."


# who asks


@dataclass(slots=True)
class Asker:
    """Who wants one file, and what it has got so far."""

    number: int
    chance: Random
    text: str  #: the file
    chat: list[dict[str, str]] = field(default_factory=list)  #: of the coming request
    turns: Agent = field(default_factory=list)

    @classmethod
    def of(cls, seed: int) -> "Asker":
        """Each has a file of its own, and edits of its own."""
        chance = Random(seed)
        return cls(seed, chance, FILES[seed % len(FILES)](chance))

    @property
    def shown(self) -> str:
        """The file as a request begins with it."""
        return f"Here is a file:\n\n```\n{self.text}\n```\n\n"

    def turn(self, _: int) -> None:
        """One edit more; the file comes first."""
        begin = "" if self.chat else self.shown
        self.chat.append({"role": "user", "content": begin + edit(self.chance, self.text)})

    def patch(self, _: int) -> None:
        """One edit of the file as it was."""
        self.chat = asked(self.shown + edit(self.chance, self.text))

    def rewrite(self, version: int) -> None:
        """A file by its description, in which one value has changed since the last version."""
        self.chat = rewrite(self.number, version)


def asked(content: str) -> list[dict[str, str]]:
    """A fresh request of the agent."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def rewrite(task: int, version: int) -> list[dict[str, str]]:
    """The request for a file by its description."""
    words, *values = TASKS[task]
    return asked(f"Write {words.format(*(some[i] for some, i in zip(values, ORDER[version])))}.")


# what the model says


def conversations(llm: LLM, seeds: Sequence[int]) -> list[Agent]:
    """Chats side by side, one for each seed."""
    return _play(llm, [Asker.of(seed) for seed in seeds], TURNS, Asker.turn, "")


def patches(llm: LLM, seeds: Sequence[int]) -> list[Agent]:
    """Edits of the same files, each by itself."""
    return _play(llm, [Asker.of(seed) for seed in seeds], VERSIONS, Asker.patch, FENCE)


def rewrites(llm: LLM, tasks: Sequence[int]) -> list[Agent]:
    """Files by their descriptions."""
    return _play(llm, [Asker.of(task) for task in tasks], VERSIONS, Asker.rewrite, FENCE)


def _play(
    llm: LLM, askers: list[Asker], rounds: int, ask: Callable[[Asker, int], None], begin: str
) -> list[Agent]:
    """All of them side by side, round by round; without those of which an answer was cut.

    `begin`: of every answer; a line that begins with the same ends it.
    """
    stop = (f"\n{begin}",) if begin else ()
    tokenizer = llm.tokenizer
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, stop=stop)
    if tokenizer is None:
        raise ConfigError("agents ask a model in words, and this one has no tokenizer")
    for at in range(rounds):
        for one in askers:
            ask(one, at)
        texts = [tokenizer.chat(one.chat) + begin for one in askers]
        prompts = [tokenizer.encode(text, add_special=False) for text in texts]
        for one, prompt, done in zip(askers, prompts, llm.generate(prompts, params), strict=True):
            said = done.outputs[0]
            one.turns.append(Turn(prompt, said.tokens))
            one.chat.append({"role": "assistant", "content": said.text})
        askers = [one for one in askers if len(one.turns[-1].answer) < OUTPUT]
    return [one.turns for one in askers]


def in_turn(agents: Sequence[Agent]) -> Iterator[tuple[int, Turn]]:
    """(which request for its file, the request): the first ones of all files, the second ones..."""
    for at, turns in enumerate(zip(*agents, strict=True)):
        yield from ((at, turn) for turn in turns)
