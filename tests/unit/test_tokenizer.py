"""The tokenizer: ids, text, streams, chat templates, from folders and from GGUF metadata."""

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvarn.core.errors import ModelError, RequestError
from kvarn.models.gguf_file import GGUFFile
from kvarn.models.pull import pull
from kvarn.models.tokenizer import Tokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = ["<|end|>", "<s>"]
TEXTS = [
    "Hello, world! It's 1234 and 3.14; don't, I'LL, we've.",
    "  two spaces\n\n\tdef f(x):\r\n        return x ** 2  # tabs\t\tand spaces   ",
    "🙂 🇸🇪 👩‍👩‍👧 日本語 العربية हिन्दी Ελληνικά",
    "e\u0301 é ﬁ \u200b\u00a0x\u3000y ½ ① ２３",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " ",
    "\n",
]


def smollm2() -> Tokenizer:
    tokenizer = Tokenizer.from_gguf(GGUFFile(pull("smollm2-135m")))
    assert tokenizer is not None
    return tokenizer


def random_texts(n: int) -> list[str]:
    chance = random.Random(0)
    ranges = [(32, 127), (32, 0x800), (0x800, 0xD800), (0x1F300, 0x1F700), (32, 33), (48, 58)]
    return [
        "".join(
            chr(chance.randrange(*chance.choice(ranges))) for _ in range(chance.randrange(1, 60))
        )
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    """A small byte-level BPE with two special tokens and one added word with a space."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(["two words"])
    return backend


def folder_of(backend: tokenizers.Tokenizer, folder: Path, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def from_folder(backend: tokenizers.Tokenizer, folder: Path, **config: Any) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder_of(backend, folder, **config))
    assert tokenizer is not None
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    stream = tokenizer.stream(skip)
    return [*[stream.step(token) for token in ids], stream.flush()]


def test_round_trip_and_special_tokens(byte_level: Any, tmp_path: Path) -> None:
    tokenizer = from_folder(
        byte_level, tmp_path, eos_token={"content": "<|end|>"}, bos_token="<s>", unk_token=None
    )
    assert tokenizer.eos_ids == (0,) and tokenizer.bos_id == 1
    assert tokenizer.vocab_size == byte_level.get_vocab_size()
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("<s>a<|end|>")
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special=False) == "<s>a<|end|>"


def test_stream_of_any_ids_adds_up_to_decode(byte_level: Any, tmp_path: Path) -> None:
    tokenizer = from_folder(byte_level, tmp_path)
    chance = random.Random(0)
    for skip in (True, False):
        for _ in range(200):
            ids = [chance.randrange(tokenizer.vocab_size) for _ in range(30)]
            assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


def test_stream_emits_whole_characters_only(byte_level: Any, tmp_path: Path) -> None:
    tokenizer = from_folder(byte_level, tmp_path)
    text = "🙂 日本 👩‍👩‍👧 é"
    pieces = streamed(tokenizer, tokenizer.encode(text), True)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = tokenizer.encode("🙂")[:-1]
    assert streamed(tokenizer, cut, True) == [""] * len(cut) + ["\ufffd"]


def test_token_bytes_spell_the_text(byte_level: Any, tmp_path: Path) -> None:
    tokenizer = from_folder(byte_level, tmp_path)
    for text in [*TEXTS, "two words<|end|>"]:
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.token_bytes(10**6) == b""


def test_lone_surrogate_is_the_requests_error(byte_level: Any, tmp_path: Path) -> None:
    tokenizer = from_folder(byte_level, tmp_path)
    with pytest.raises(RequestError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_folder_without_or_with_another_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"has tokenizer\.model but no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'bad' %}\n"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}\n"
    "{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}{{ '\\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{{ extra }}"
)


def test_chat_template(byte_level: Any, tmp_path: Path) -> None:
    tokenizer = from_folder(byte_level, tmp_path, bos_token="<s>", chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages) == "<s>user: hi\nassistant:"
    assert tokenizer.chat(messages, add_generation_prompt=False, extra="!") == "<s>user: hi\n!"
    tools = [{"name": "f", "note": "é <b>"}]
    assert '[{"name": "f", "note": "é <b>"}]assistant:' in tokenizer.chat(messages, tools)
    with pytest.raises(RequestError, match="no role bad"):
        tokenizer.chat([{"role": "bad", "content": ""}])


def test_named_templates_and_template_files(byte_level: Any, tmp_path: Path) -> None:
    named = [{"name": n, "template": f"{n}!"} for n in ("default", "tool_use")]
    tokenizer = from_folder(byte_level, tmp_path, chat_template=named)
    assert tokenizer.chat([]) == "default!"
    assert tokenizer.chat([], tools=[{}]) == "tool_use!"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert from_folder(byte_level, tmp_path, chat_template=named).chat([]) == "from the file"


def test_templates_cannot_reach_python(byte_level: Any, tmp_path: Path) -> None:
    evil = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = from_folder(byte_level, tmp_path, chat_template=evil)
    with pytest.raises(RequestError, match="unsafe"):
        tokenizer.chat([])


def test_no_template_and_broken_template(byte_level: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        from_folder(byte_level, tmp_path).chat([{"role": "user", "content": "hi"}])
    with pytest.raises(ModelError, match="chat template is broken"):
        from_folder(byte_level, tmp_path, chat_template="{% for %}")


def test_smollm2_ids_are_those_of_its_own_pre_tokenizer() -> None:
    """SmolLM2's tokenizer.json cuts out single digits, then applies GPT-2's pattern."""
    tokenizer = smollm2()
    reference = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    own_source = Path(__file__).read_text(encoding="utf-8")
    for text in [*TEXTS, own_source, *random_texts(300)]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text).ids
        assert tokenizer.decode(ids, skip_special=False) == text
        assert "".join(streamed(tokenizer, ids, False)) == text


def test_smollm2_agrees_with_transformers() -> None:
    """Apart from digits: transformers rebuilds this tokenizer without its cut around digits."""
    transformers = pytest.importorskip("transformers")
    tokenizer = smollm2()
    file = pull("smollm2-135m")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8"), *random_texts(300)]:
        plain = "".join(c for c in text if not unicodedata.category(c).startswith("N"))
        assert tokenizer.encode(plain) == theirs(plain, add_special_tokens=False)["input_ids"]
    messages = [{"role": "user", "content": "Hi <b> é"}, {"role": "assistant", "content": "yes"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat(messages) == expected
