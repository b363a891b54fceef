"""Tokenizers in GGUF metadata: SentencePiece-style BPE by scores, and byte-level BPE."""

from pathlib import Path
from typing import Any

import gguf
import pytest

from kvarn.core.errors import ModelError
from kvarn.models import tokenizer as tokenizing
from kvarn.models.gguf_file import GGUFFile
from kvarn.models.tokenizer import Tokenizer
from kvarn.models.tokenizer_gguf import BYTE, CONTROL, NORMAL, PRE, UNKNOWN, USER

PIECES = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "bc", "abc", "▁▁", "d", "<tag>"]
#: higher is merged first: "ab" before "bc", and "▁ab" before "abc"
SCORES = [-9.0, -9.0, -9.0, -9.0, -4.0, -1.0, -2.0, -1.5, -3.0, -2.5, -9.0, 0.0]


def write(path: Path, **meta: Any) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in meta.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path)


def sentencepiece(path: Path, **meta: Any) -> GGUFFile:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *PIECES]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(PIECES) - 1), USER]
    return write(
        path,
        model="llama",
        tokens=tokens,
        token_type=types,
        scores=[0.0] * 259 + SCORES,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        **meta,
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(file: GGUFFile) -> Tokenizer:
    tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer is not None
    return tokenizer


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.backend.id_to_token(i) for i in tokenizer.encode(text, add_special=False)]


def test_merges_follow_the_scores(tmp_path: Path) -> None:
    tokenizer = made(sentencepiece(tmp_path / "m.gguf"))
    assert words(tokenizer, "abc") == ["▁ab", "c"]
    assert words(tokenizer, "dbc abc") == ["▁", "d", "bc", "▁ab", "c"]
    assert words(tokenizer, "a<tag>a") == ["▁a", "<tag>", "▁a"]
    assert tokenizer.eos_ids == (2,) and tokenizer.bos_id == 1
    assert tokenizer.encode("a")[0] == 1, "BOS comes first by default"


def test_without_a_space_in_front(tmp_path: Path) -> None:
    tokenizer = made(
        sentencepiece(tmp_path / "m.gguf", add_space_prefix=False, add_bos_token=False)
    )
    assert words(tokenizer, "abcc") == ["abc", "c"]
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special=False)
    assert tokenizer.decode(tokenizer.encode(" abc  a")) == " abc  a"


@pytest.mark.parametrize("prefix", [True, False])
def test_bytes_for_the_rest_and_streams(prefix: bool, tmp_path: Path) -> None:
    tokenizer = made(sentencepiece(tmp_path / "m.gguf", add_space_prefix=prefix))
    for text in ["abc é 🙂 a", "日本 abc", "a  a", "é", "a🙂"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        pieces = [*[stream.step(i) for i in ids], stream.flush()]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        spelled = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special=False)))
        assert spelled.decode() == (" " if prefix else "") + text
    cut = tokenizer.encode("🙂")[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.step(i) for i in cut) == ""
    assert stream.flush() == "\ufffd\ufffd\ufffd"


def test_built_once_and_kept(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sentencepiece(tmp_path / "m.gguf")
    first = made(file)
    (kept,) = (own_cache / "tokenizers").iterdir()
    assert kept.suffix == ".json"
    monkeypatch.setattr("kvarn.models.tokenizer_gguf._merges_from_scores", None)
    assert made(file).backend.to_str() == first.backend.to_str()


@pytest.mark.parametrize("pre", PRE)
def test_every_pre_tokenizer_round_trips(pre: str, tmp_path: Path) -> None:
    alphabet = sorted(tokenizing._BYTES)
    file = write(
        tmp_path / "m.gguf",
        model="gpt2",
        pre=pre,
        tokens=[*alphabet, "ab", "<e>"],
        token_type=[NORMAL] * (len(alphabet) + 1) + [CONTROL],
        merges=["a b"],
        bos_token_id=len(alphabet) + 1,
    )
    tokenizer = made(file)
    text = "It's  1234 ab\n\n\tÀéΩ 日本 🙂 x+y=z  <e>"
    assert tokenizer.decode(tokenizer.encode(text, add_special=False), False) == text
    begins = tokenizer.encode("ab") == [len(alphabet) + 1, len(alphabet)]
    assert begins == (pre in ("llama-bpe", "tekken"))


def test_digits_are_cut_as_each_model_was_trained(tmp_path: Path) -> None:
    alphabet = sorted(tokenizing._BYTES)
    tokens = [*alphabet, "12", "123"]

    def cut(pre: str) -> list[str]:
        file = write(
            tmp_path / f"{pre}.gguf",
            model="gpt2",
            pre=pre,
            tokens=tokens,
            token_type=[NORMAL] * len(tokens),
            merges=["1 2", "12 3"],
        )
        return words(made(file), "12312")

    assert cut("llama-bpe") == ["123", "12"]
    assert cut("gpt-2") == ["123", "12"]
    assert cut("qwen2") == cut("smollm") == ["1", "2", "3", "1", "2"]


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'bert' is not supported; supported: gpt2, llama"):
        Tokenizer.from_gguf(write(tmp_path / "a.gguf", model="bert", tokens=["a"]))
    with pytest.raises(ModelError, match=r"pre-tokenizer 'smolm' is not .* mean 'smollm'"):
        Tokenizer.from_gguf(write(tmp_path / "b.gguf", model="gpt2", pre="smolm", tokens=["a"]))
    with pytest.raises(ModelError, match=r"no tokenizer\.ggml\.tokens"):
        Tokenizer.from_gguf(write(tmp_path / "c.gguf", model="gpt2"))
    with pytest.raises(ModelError, match="no score"):
        Tokenizer.from_gguf(write(tmp_path / "d.gguf", model="llama", tokens=["a"]))
    assert Tokenizer.from_gguf(write(tmp_path / "e.gguf")) is None
