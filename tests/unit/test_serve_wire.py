"""Messages survive the wire, however the bytes are cut."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.core.errors import QueueFull, RequestError
from kvarn.core.output import Output, Timings
from kvarn.core.plan import TokenLogprobs
from kvarn.core.request import SLO, Grammar, Request, SamplingParams
from kvarn.serve import wire

REQUEST = Request(
    id="r",
    prompt=[1, 2, 3],
    sampling=SamplingParams(
        n=2, stop=("a", "é"), logit_bias={5: -1.5}, seed=2**63, grammar=Grammar("regex", "a*"),
        allowed_token_ids=(1, 2), bad_word_ids=((1,), (2, 3)),
    ),
    slo=SLO(ttft=0.5),
    pooling=None,
    eos_ids=(2,),
)  # fmt: skip
OUTPUT = Output(
    "r", 1, tokens=[4], text="é", finish="stop", stop="é",
    logprobs=[TokenLogprobs(4, -0.5, 1, [(4, -0.5), (5, -1.0)])],
    prompt_logprobs=[None, TokenLogprobs(4, -0.5, 1)],
    timings=Timings(1.0, 2.0, 3.0),
)  # fmt: skip


def test_to_engine_and_back() -> None:
    (body,) = wire.Frames().feed(wire.frame(wire.Add(REQUEST)))
    assert wire.to_engine(body) == wire.Add(REQUEST)
    (body,) = wire.Frames().feed(wire.frame(wire.Outputs([OUTPUT, OUTPUT])))
    assert wire.from_engine(body) == wire.Outputs([OUTPUT, OUTPUT])


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(1, 50), max_size=40))
def test_frames_in_any_pieces(ids: list[bytes], sizes: list[int]) -> None:
    messages = [wire.Abort([id.hex()]) for id in ids]
    stream = b"".join(wire.frame(message) for message in messages)
    frames, found = wire.Frames(), []
    for size in [*sizes, len(stream)]:
        piece, stream = stream[:size], stream[size:]
        found += [wire.to_engine(body) for body in frames.feed(piece)]
    found += [wire.to_engine(body) for body in frames.feed(stream)]
    assert found == messages


def test_refusals_keep_their_kind() -> None:
    error = wire.Refused.of("r", QueueFull("full", 3.0)).error()
    assert isinstance(error, QueueFull)
    assert (error.message, error.retry_after, error.status) == ("full", 3.0, 429)
    error = wire.Refused.of("r", RequestError("no", param="n", code="c", status=422)).error()
    assert (error.message, error.param, error.code, error.status) == ("no", "n", "c", 422)


def test_link_takes_what_is_there_and_notices_the_end() -> None:
    ours, theirs = socket.socketpair()
    link = wire.Link(theirs)
    assert link.receive(wait=False) == []
    ours.sendall(wire.frame(wire.Abort(["a"])) + wire.frame(wire.Abort(["b"])))
    assert link.receive(wait=True) == [wire.Abort(["a"]), wire.Abort(["b"])]
    ours.close()
    with pytest.raises(wire.Closed):
        link.receive(wait=True)
    with pytest.raises(wire.Closed):
        link.send(wire.Failed("x"))
    theirs.close()
