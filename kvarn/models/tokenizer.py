"""Text to token ids and back, and chat templates, over the `tokenizers` library."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from kvarn.core.errors import ModelError, RequestError
from kvarn.models.chat_template import ChatTemplate
from kvarn.models.detokenize import ByteStream, Stream, WindowStream
from kvarn.models.gguf_file import GGUFFile
from kvarn.models.json_file import read_json
from kvarn.models.pull import cache_folder
from kvarn.models.tokenizer_gguf import backend_from_gguf

#: files of other tokenizer formats, which are not read
OTHERS = ("tokenizer.model", "vocab.json", "tekken.json")


class Tokenizer:
    """A model's tokenizer: `encode`, `decode`, `stream`, `chat`."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, special: dict[str, str], templates: dict[str, str]
    ) -> None:
        """`special` maps names such as "eos_token" to tokens, `templates` names to sources."""
        self.backend = backend
        self.template = ChatTemplate(templates, special)
        ids = {name: backend.token_to_id(token) for name, token in special.items()}
        self.bos_id: int | None = ids.get("bos_token")
        eos = ids.get("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """From tokenizer.json and the files beside it; None where there is no tokenizer at all."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            other = next((name for name in OTHERS if (folder / name).is_file()), None)
            if other is None:
                return None
            raise ModelError(f"{folder} has {other} but no tokenizer.json, which is what is read")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises the bare class
            raise ModelError(f"{path} cannot be read: {error}") from None
        backend.no_truncation()
        backend.no_padding()
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                config |= read_json(folder / name)
        return cls(backend, special=_special(config), templates=_templates(config, folder))

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "Tokenizer | None":
        """From the metadata of a GGUF file; None where it holds none."""
        backend = backend_from_gguf(file, cache_folder() / "tokenizers")
        if backend is None:
            return None
        meta = file.metadata
        tokens = meta["tokenizer.ggml.tokens"]
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        special = {}
        for ours, theirs in names.items():
            number = meta.get(f"tokenizer.ggml.{theirs}_token_id")
            if number is not None:
                special[f"{ours}_token"] = tokens[number]
        template = meta.get("tokenizer.chat_template")
        return cls(backend, special=special, templates={"default": template} if template else {})

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        added = self.backend.get_added_tokens_decoder()
        return max([self.backend.get_vocab_size(with_added_tokens=False) - 1, *added]) + 1

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text; `add_special` puts BOS and the like where the model wants them."""
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special).ids
        except (UnicodeEncodeError, TypeError):
            raise RequestError(
                "the text is not valid Unicode (a lone surrogate?)", code="invalid_unicode"
            ) from None
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; ids that are no token give no text."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def stream(self, skip_special: bool = True) -> Stream:
        """A detokeniser for one sequence, token by token."""
        skipped: frozenset[int] = self._special_ids if skip_special else frozenset()
        if self._byte_level:
            return ByteStream(self.token_bytes, skipped)
        return WindowStream(lambda ids: self.decode(ids, skip_special=False), skipped)

    def chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation by the model's template; `variables` go to the template.

        It contains BOS where the model wants one: encode it with `add_special=False`.
        """
        return self.template.render(
            messages, tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; b"" for an id without a token."""
        text = self.backend.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            try:
                return bytes([_BYTES[c] for c in text])
            except KeyError:  # an added token, written as plain text
                return text.encode()
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self.backend.decoder
        return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


def _special(config: dict[str, Any]) -> dict[str, str]:
    """The named special tokens, which are strings or objects with a "content"."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token") and not name.startswith("add_"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _templates(config: dict[str, Any], folder: Path) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja, or those of tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return {"default": path.read_text(encoding="utf-8")}
    value = config.get("chat_template")
    if value is None and (folder / "chat_template.json").is_file():
        value = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return {"default": value} if isinstance(value, str) else {}
