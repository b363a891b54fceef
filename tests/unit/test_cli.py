"""The command line: flags of every option, errors, exit codes, output, on a made-up engine."""

import json
import subprocess
import sys
import types
from dataclasses import fields
from io import StringIO
from typing import ClassVar

import pytest

from kvarn import __version__, cli, cli_chat
from kvarn.cli_options import takes
from kvarn.core.config import EngineConfig, resolve
from kvarn.core.errors import ConfigError, RequestError
from kvarn.core.output import EngineStats, Output, Timings
from kvarn.core.request import Grammar, SamplingParams


class FakeEngine:
    def __init__(self, options):
        self.resolved = resolve(options, {})
        self.steps = 0

    def stats(self):
        self.steps += 5
        return EngineStats(steps=self.steps)

    def explain(self):
        return {
            "options": self.resolved.rows(),
            "parts": [{"name": "continuous", "kind": "scheduler", "needs": [], "gives": ["A"]}],
            "capabilities": ["PAGED_KV"],
            "ranks": [],
            "execution": [{"what": "layers", "how": "one compiled call", "why": "all can"}],
            "memory": [{"what": "weights", "gib": 0.25}],
            "startup": [{"stage": "weights", "seconds": 1.5}],
        }


class FakeLLM:
    """Answers with the words of the prompt, one token each; remembers what it was asked."""

    made: ClassVar[list["FakeLLM"]] = []
    interrupt = False

    def __init__(self, **options):
        self.options = options
        self.engine = FakeEngine(options)
        self.tokenizer = None if options.get("load") == "random" else object()
        self.asked = []
        self.closed = False
        FakeLLM.made.append(self)

    def generate(self, prompts, params, on_output=None):
        if params.temperature < 0:
            raise RequestError("temperature must not be negative", param="temperature")
        return [self._answer(prompt, params, on_output) for prompt in prompts]

    def chat(self, messages, params, on_output=None):
        return self._answer(list(messages), params, on_output)

    def _answer(self, prompt, params, on_output):
        self.asked.append((prompt, params))
        for i, word in enumerate(["one ", "two ", "three"]):
            if self.interrupt and i == 1:
                raise KeyboardInterrupt
            if on_output is not None:
                on_output(Output("r", 0, tokens=[i], text=word))
        outputs = [
            types.SimpleNamespace(
                index=i, text="one two three", tokens=[0, 1, 2], finish="length", stop=None,
                logprobs=None,
            )
            for i in range(params.n)
        ]  # fmt: skip
        return types.SimpleNamespace(
            request_id="r", prompt_tokens=[7, 8], outputs=outputs, n_cached=1,
            timings=Timings(0.001, 0.002, 0.003),
        )  # fmt: skip

    def close(self):
        self.closed = True


@pytest.fixture
def llms(monkeypatch):
    """The engines that a command makes, all of them made up; no model is fetched."""
    monkeypatch.setitem(sys.modules, "kvarn.engine.llm", types.SimpleNamespace(LLM=FakeLLM))
    monkeypatch.setattr("kvarn.cli_model.fetch", lambda config: None)
    monkeypatch.setattr(FakeLLM, "made", [])
    monkeypatch.setattr(FakeLLM, "interrupt", False)
    return FakeLLM.made


def test_the_package_runs_as_the_program():
    command = [sys.executable, "-m", "kvarn", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith(__version__)


def test_version_and_help(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "kvarn 0.1.0\n"
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("serve", "chat", "generate", "bench", "parts", "explain", "pull"):
        assert command in out


def test_help_loads_no_model_code():
    program = (
        "import sys; from kvarn.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'fastapi', 'uvicorn', 'asyncio'}\n"
        "print(heavy & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"


@pytest.mark.parametrize(
    "command",
    [["serve"], ["chat"], ["generate"], ["explain"], ["bench", "offline"], ["bench", "latency"],
     ["bench", "startup"]],
)  # fmt: skip
def test_every_engine_option_is_a_flag(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    for field in fields(EngineConfig):
        assert f"--{field.name.replace('_', '-')}" in out
        assert field.metadata["doc"].split()[0] in out


def test_every_sampling_parameter_is_a_flag_of_generate(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["generate", "--help"])
    out = capsys.readouterr().out
    for field in fields(SamplingParams):
        if field.name not in cli.NO_FLAG:
            assert f"--{field.name.replace('_', '-')}" in out
    assert "keep the smallest set with this probability mass" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--temperatur", "1", "x"], "did you mean --temperature?"),
        (["serve", "--max-sequences", "1"], "did you mean --max-seqs?"),
        (["bench", "serve", "--rate", "1"], "did you mean --"),
        (["generat"], "generate"),
        (["generate", "--max-len", "many", "x"], "--max-len"),
        (["generate", "--dtype", "bf16", "x"], "did you mean 'bfloat16'?"),
        (["generate", "--max-seqs", "0", "x"], "at least 1"),
        (["generate", "--stop-token-ids", "a", "x"], "stop_token_ids"),
        (["generate", "--logit-bias", "a:b", "x"], "ID:VALUE"),
        (["generate", "--logprobs-mode", "rare", "x"], "did you mean 'raw'?"),
        (["generate", "--temperature", "-1", "x"], "temperature must not be negative"),
        (["generate", "--ids", "1,x"], "token ids"),
        (["generate", "--regex", "a", "--json-object", "x"], "give one of"),
        (["generate", "a", "b", "c"], "quotes"),
        (["generate", "--file", "/nonexistent/file"], "cannot read"),
        (["generate", "m", "x", "--model", "n"], "two models"),
        (["bench", "offline", "--preset", "W2"], "unknown workload 'W2'"),
        (["bench", "latency", "--batch-sizes", "0"], "above 0"),
        (["bench", "compare", "/nonexistent/a", "/nonexistent/b"], "cannot read"),
        (["bench"], "Missing command"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(words, message, llms, capsys):
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("kvarn: ")
    assert err.count("\n") == 1


def test_what_fails_while_running_is_exit_code_1(capsys):
    assert cli.main(["bench", "serve", "--base-url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.startswith("kvarn: no model list from")


def test_generate_streams_the_answer(llms, capsys):
    assert cli.main(["generate", "Hi", "--top-k", "3", "--stop", "a", "--stop", "b"]) == 0
    assert capsys.readouterr().out == "one two three\n"
    (llm,) = llms
    prompt, params = llm.asked[0]
    assert prompt == "Hi"
    assert (params.top_k, params.stop, params.max_tokens) == (3, ("a", "b"), 128)
    assert llm.closed


def test_generate_json_is_one_object(llms, capsys):
    words = ["generate", "smollm2", "Hi", "--json", "--n", "2", "--max-tokens", "3"]
    assert cli.main([*words, "--logit-bias", "5:-1.5", "--no-ignore-eos"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["tokens"]) == ("one two three", [0, 1, 2])
    assert (found["model"], found["finish_reason"]) == ("smollm2", "length")
    assert found["usage"] == {
        "prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 1},
    }  # fmt: skip
    assert found["timings"]["time_to_first_token_ms"] == 2.0
    assert len(found["choices"]) == 2
    assert llms[0].asked[0][1].logit_bias == {5: -1.5}


def test_generate_takes_ids_files_stdin_and_templates(llms, capsys, tmp_path, monkeypatch):
    assert cli.main(["generate", "--ids", "3,4 5", "--load", "random"]) == 0
    assert llms[-1].asked[0][0] == [3, 4, 5]
    assert capsys.readouterr().out == "0,1,2\n"
    path = tmp_path / "prompt"
    path.write_text("from a file")
    cli.main(["generate", "--file", str(path)])
    assert llms[-1].asked[0][0] == "from a file"
    monkeypatch.setattr("sys.stdin", StringIO("from stdin\n"))
    cli.main(["generate", "--model", "m"])
    assert llms[-1].asked[0][0] == "from stdin"
    cli.main(["generate", "--chat", "Hi"])
    assert llms[-1].asked[0][0] == [{"role": "user", "content": "Hi"}]


def test_generate_makes_grammars(llms, capsys, tmp_path):
    path = tmp_path / "schema"
    path.write_text('{"type": "integer"}')
    cli.main(["generate", "x", "--json-schema", f"@{path}"])
    assert llms[-1].asked[0][1].grammar == Grammar("json_schema", '{"type": "integer"}')
    cli.main(["generate", "x", "--regex", "[ab]+"])
    assert llms[-1].asked[0][1].grammar == Grammar("regex", "[ab]+")


def test_only_what_was_said_reaches_the_engine(llms, monkeypatch):
    monkeypatch.setenv("KVARN_MAX_SEQS", "7")
    cli.main(["generate", "--deterministic", "--page-size", "8", "x"])
    assert llms[0].options == {"deterministic": True, "page_size": 8}


def test_explain_shows_value_origin_and_why(llms, capsys):
    assert cli.main(["explain", "--json", "--max-seqs", "9"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = next(row for row in found["options"] if row["option"] == "max_seqs")
    assert (row["value"], row["source"]) == (9, "flag")
    assert cli.main(["explain"]) == 0
    out = capsys.readouterr().out
    for word in ("max_seqs", "continuous", "PAGED_KV", "weights", "1.5", "Memory"):
        assert word in out


def test_parts_are_listed_for_people_and_programs(capsys):
    assert cli.main(["parts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    keys = {"name", "kind", "paper", "needs", "gives", "regime", "result"}
    assert all(set(row) == keys for row in rows)
    assert {"scheduler", "prefix", "evict", "attention"} <= {row["kind"] for row in rows}
    assert cli.main(["parts"]) == 0
    assert "continuous" in capsys.readouterr().out


def test_chat_reads_lines_from_a_pipe(llms, capsys, monkeypatch, tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["Hello", "", "/params temperature=0.5", "Again", f"/save {saved}", "/quit", "unread"]
    monkeypatch.setattr("sys.stdin", StringIO("\n".join(lines)))
    assert cli.main(["chat", "--system", "Be brief", "--max-tokens", "9"]) == 0
    assert "one two three\n" in capsys.readouterr().out
    first, second = llms[0].asked
    assert [message["content"] for message in first[0]] == ["Be brief", "Hello"]
    assert [message["role"] for message in second[0]] == ["system", "user", "assistant", "user"]
    assert (first[1].temperature, first[1].max_tokens) == (0.0, 9)
    assert second[1].temperature == 0.5
    said = [message["role"] for message in json.loads(saved.read_text())["messages"]]
    assert said == ["system", "user", "assistant", "user", "assistant"]


def chat(**fields):
    remarks = []
    return cli_chat.Chat(FakeLLM(), SamplingParams(), say=remarks.append, **fields), remarks


def test_an_interrupted_answer_stays_as_far_as_it_came(monkeypatch):
    monkeypatch.setattr(FakeLLM, "interrupt", True)
    talk, _ = chat()
    figures = talk.answer("Hi", lambda text: None)
    assert "stopped by you" in figures
    assert talk.messages[-1] == {"role": "assistant", "content": "one "}


def test_a_refused_question_is_forgotten(monkeypatch):
    talk, _ = chat()

    def refuse(*args, **more):
        raise RequestError("too long")

    monkeypatch.setattr(talk.llm, "chat", refuse)
    with pytest.raises(RequestError):
        talk.answer("Hi", lambda text: None)
    assert talk.messages == []


def test_chat_commands():
    talk, remarks = chat(system="old")
    talk.answer("Hi", lambda text: None)
    assert talk.command("/system new one")
    assert (talk.system, talk.messages) == ("new one", [])
    talk.command("/params top_k=5 stop=a,b seed=none logit_bias=3:1.5 ignore_eos=true")
    params = talk.params
    assert (params.top_k, params.stop, params.seed) == (5, ("a", "b"), None)
    assert (params.logit_bias, params.ignore_eos) == ({3: 1.5}, True)
    talk.command("/help")
    assert any("/reset" in line for line in remarks)
    assert not talk.command("/quit")
    with pytest.raises(ConfigError, match="did you mean '/reset'"):
        talk.command("/rest")
    with pytest.raises(ConfigError, match="did you mean 'top_k'"):
        talk.command("/params topk=1")
    with pytest.raises(ConfigError, match="temperature must be of type float"):
        talk.command("/params temperature=warm")


def test_goodput_takes_all_words_that_follow():
    assert cli.spread(["--goodput", "ttft:1", "tpot:2", "--seed", "3", "x"]) == [
        "--goodput", "ttft:1", "--goodput", "tpot:2", "--seed", "3", "x"
    ]  # fmt: skip


def test_flags_know_defaults_of_their_own():
    @takes(sampling=SamplingParams, defaults={"max_tokens": 9})
    def command(sampling):
        return sampling

    said = {field.name: None for field in fields(SamplingParams)}
    assert command(**said) == {"max_tokens": 9}
    assert command(**(said | {"max_tokens": 3, "top_p": 0.5})) == {"max_tokens": 3, "top_p": 0.5}


def test_compare_prints_ratios_and_refuses_other_workloads(tmp_path, capsys):
    a = {"bench": "serve", "workload": {"n": 1}, "output_throughput": 10.0}
    paths = []
    for name, found in (
        ("a", a),
        ("b", a | {"output_throughput": 25.0}),
        ("c", a | {"workload": {}}),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(found))
        paths.append(str(path))
    assert cli.main(["bench", "compare", paths[0], paths[1]]) == 0
    assert "2.500" in capsys.readouterr().out
    assert cli.main(["bench", "compare", paths[0], paths[2]]) == 1
    assert "workloads differ" in capsys.readouterr().err
    assert cli.main(["bench", "compare", "--force", paths[0], paths[2]]) == 0
