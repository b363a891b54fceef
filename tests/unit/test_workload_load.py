"""Trace files in one normal form: formats, units, sessions, malformed rows, tokens."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.bench.options import Workload
from kvarn.bench.prompts import make_jobs
from kvarn.core.errors import ConfigError
from kvarn.workload.load import open_trace
from kvarn.workload.tokens import block_tokens, prompt_tokens
from kvarn.workload.trace import TraceRequest

BURST = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
)
FILES = {
    "mooncake.jsonl": (
        '{"timestamp": 2000, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
        '{"timestamp": 1000, "input_length": 512, "output_length": 6, "hash_ids": [1]}\n',
        [(0.0, 512, 6, (1,)), (1.0, 600, 5, (1, 2))], 512,
    ),
    "fine.jsonl": (
        '{"timestamp": 0, "input_length": 40, "output_length": 5, "hash_ids": [1, 2]}\n',
        [(0.0, 40, 5, (1, 2))], 16,
    ),
    "azure.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799601,374,44\n"
        "2023-11-16 18:17:04.0319600,396,109\n",
        [(0.0, 374, 44, ()), (0.0519999, 396, 109, ())], 512,
    ),
    "azure2024.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,1,2\n"
        "2024-05-10 00:01:00.5+00:00,3,4\n",
        [(0.0, 1, 2, ()), (60.5, 3, 4, ())], 512,
    ),
    "burst.csv": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,10,0,10,Conversation log\n",
        [(0.0, 472, 18, ())], 512,
    ),
    "chats.json": (
        '[{"conversations": [{"value": "one two three four"}, {"value": "five"}]}]',
        [(0.0, 5, 1, ())], 512,
    ),
    "lengths.csv": ("num_prefill_tokens,num_decode_tokens\n12,3\n", [(0.0, 12, 3, ())], 512),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_is_told_by_its_columns(tmp_path, name, zipped):
    text, expected, size = FILES[name]
    path = tmp_path / (name + ".gz" * zipped)
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    found = open_trace(str(path))
    assert [(round(r.at, 7), r.n_in, r.n_out, r.blocks) for r in found] == expected
    assert (found.block_size, found.name) == (size, name.rpartition(".")[0])


def test_failures_are_left_out_and_counted(tmp_path):
    path = tmp_path / "burst.csv"
    path.write_text(FILES["burst.csv"][0])
    found = open_trace(str(path))
    assert (found.chain, found.skipped) == (("left_out(1 rows without an answer)",), 0)


def test_burstgpt_sessions_are_linked_in_order_of_time(tmp_path):
    path = tmp_path / "burst.csv"
    rows = ["9,s,1,GPT-4,30,5,35,Conversation log", "1,s,1,GPT-4,10,5,15,Conversation log",
            "2,,1,GPT-4,10,5,15,API log"]  # fmt: skip
    path.write_text("\n".join([BURST, *rows]))
    found = [(r.at, r.session, r.turn, r.parent) for r in open_trace(str(path))]
    assert found == [(0.0, "s", 0, None), (1.0, None, 0, None), (8.0, "s", 1, "1")]


def test_bailian_conversations_keep_their_parents(tmp_path):
    path = tmp_path / "bailian.jsonl"
    rows = [(7, -1, 1), (8, 7, 2), (9, 8, 3), (5, 4, 6)]
    path.write_text("\n".join(
        json.dumps({"chat_id": chat, "parent_chat_id": parent, "timestamp": 0.5 * chat,
                    "input_length": 16, "output_length": 9, "type": "text", "turn": turn,
                    "hash_ids": [chat]})
        for chat, parent, turn in rows
    ))  # fmt: skip
    found = {r.id: (r.session, r.turn, r.parent) for r in open_trace(str(path))}
    assert found == {
        "7": ("7", 0, None), "8": ("7", 1, "7"), "9": ("7", 2, "8"), "5": ("5", 5, None),
    }  # fmt: skip
    path.write_text(path.read_text() + "\n" + path.read_text().splitlines()[0])
    with pytest.raises(ConfigError, match="line 5: 7 names two requests"):
        open_trace(str(path))


GOOD = '{"timestamp": 1, "input_length": 5, "output_length": 2}'
BLOCKS = '{"timestamp": 1, "input_length": 5, "output_length": 2, "hash_ids": %s}'
BAD = [
    ('{"timestamp": 1, "input_length": 0, "output_length": 2}', "input_length is 0"),
    ('{"timestamp": -1, "input_length": 5, "output_length": 2}', "timestamp is -1"),
    ('{"timestamp": NaN, "input_length": 5, "output_length": 2}', "timestamp is nan"),
    ('{"timestamp": 1, "input_length": 2.5, "output_length": 2}', "not a whole number"),
    ('{"timestamp": 1, "input_length": "many", "output_length": 2}', "not a number"),
    ('{"timestamp": 1, "output_length": 2}', "input_length is missing"),
    (f'{{"timestamp": 1, "input_length": 1{"0" * 400}, "output_length": 2}}', "not a number"),
    (BLOCKS % '"ab"', "hash_ids must be"),
    (BLOCKS % 7, "hash_ids must be"),
    (BLOCKS % "[1, 2, 3]", "3 hash_ids of 512 for 5 tokens"),
    ("{oh", "not JSON"),
    ("[1]", "not a JSON object"),
]


@pytest.mark.parametrize("row, says", BAD, ids=[says for _, says in BAD])
def test_a_malformed_row_is_named_or_counted(tmp_path, row, says):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join([GOOD, row, GOOD, ""]))
    with pytest.raises(ConfigError, match=rf"trace.jsonl, line 2: .*{says}"):
        open_trace(str(path))
    found = open_trace(str(path), skip_bad=True)
    assert (len(found), found.skipped) == (2, 1)


@pytest.mark.parametrize("row", ["16 Nov,374,44", ",374,44", "2023-11-16 18:17:03,,44", "2023"])
def test_malformed_dates_and_short_rows_are_named(tmp_path, row):
    path = tmp_path / "azure.csv"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{row}\n")
    with pytest.raises(ConfigError, match=r"azure.csv, line 2: (TIMESTAMP|ContextTokens) is"):
        open_trace(str(path))


def test_what_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"colour": "red"}\n')
    with pytest.raises(ConfigError, match="no known trace has the columns"):
        open_trace(str(path))
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no request"):
        open_trace(str(path))
    with pytest.raises(ConfigError, match="did you mean 'mooncake'"):
        open_trace(str(path), "moncake")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(ConfigError, match=r"cannot read .*x.jsonl.gz"):
        open_trace(str(tmp_path / "x.jsonl.gz"))


@given(
    st.lists(st.integers(0, 5), max_size=4), st.lists(st.integers(0, 5), max_size=4),
    st.integers(1, 90), st.integers(1, 90),
)  # fmt: skip
def test_tokens_are_equal_exactly_where_blocks_are(left, right, n_left, n_right):
    one, two = (
        TraceRequest("a", 0, n_left, 1, (*left,)),
        TraceRequest("b", 0, n_right, 1, (*right,)),
    )
    for tokens in (block_tokens, lambda r, size: prompt_tokens(r, size, 1 << 30, 0)):
        a, b = tokens(one, 16), tokens(two, 16)
        assert (len(a), len(b)) == (n_left, n_right)
        for j in range(0, min(n_left, n_right), 16):
            end = min(j + 16, n_left, n_right)
            known = j // 16 < min(len(left), len(right))
            equal = known and left[j // 16] == right[j // 16]
            assert (a[j:end] == b[j:end]) == equal


def test_a_session_of_a_trace_is_one_job_of_several_turns(tmp_path):
    path = tmp_path / "burst.csv"
    path.write_text(
        f"{BURST}\n1,s,1,GPT-4,10,5,15,Chat\n2,,1,GPT-4,8,3,11,API\n9,s,1,GPT-4,40,6,46,Chat\n"
    )
    chat, single = make_jobs(Workload("trace", num_prompts=9, dataset_path=str(path)))
    assert (chat.at, single.at) == (0.0, 1.0)
    first, second = chat.turns
    assert (len(first.prompt), len(first.reply), len(second.prompt)) == (10, 5, 25)
    assert (second.n_output, second.reply, len(single.turns)) == (6, [], 1)
