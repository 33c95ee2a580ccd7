"""The files of a Hugging Face tokenizer folder, and the same for a tokenizer of fewer ids."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.common.files import sha256, write_aside
from megatron_ext.tokenizer.build import HUGGINGFACE_FILES, folder_sha256, require_no_code
from megatron_ext.tokenizer.compress import CompressionError

DESCRIPTION, CONFIG = "tokenizer.json", "tokenizer_config.json"
#: What goes with the description. Templates name tokens by their text, so that they need no change.
TEMPLATES = ("chat_template.jinja", "chat_template.json")
COMPANIONS = (CONFIG, "special_tokens_map.json", "added_tokens.json", "generation_config.json", *TEMPLATES)
_LACKS = "which tokenizer.json lacks; save the tokenizer with transformers, which writes it there"
_LISTS_OF_TOKENS = ("additional_special_tokens", "extra_special_tokens")
#: Entries of generation_config.json that are lists of ids, and those that hold ids among other things.
_LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens")
_OTHER_IDS = ("bad_words_ids", "force_words_ids", "forced_decoder_ids", "sequence_bias")


@dataclass(frozen=True)
class HuggingFaceFolder:
    """What a tokenizer's folder holds.

    Attributes:
        name: for messages.
        files: name -> content of tokenizer.json and its companions.
        sha256: of the files that decide the ids, as checkpoints and datasets store it.
    """

    name: str
    files: dict[str, bytes]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> HuggingFaceFolder:
        """A folder with tokenizer.json; or such a file under any name, which stands alone under any other.

        Raises:
            ValueError: there is no tokenizer.json, or the tokenizer is Python code.
        """
        if path.is_file() and path.name != DESCRIPTION:
            data = path.read_bytes()
            return cls.alone(str(path), data, sha256(data), {})
        folder = path if path.is_dir() else path.parent
        if not (folder / DESCRIPTION).is_file():
            raise CompressionError(
                f"--tokenizer-model {path}: a folder without tokenizer.json; name its SentencePiece model or "
                ".tiktoken file, or save it with transformers as a fast tokenizer"
            )
        require_no_code(folder)
        names = [name for name in (DESCRIPTION, *COMPANIONS) if (folder / name).is_file()]
        files = {name: (folder / name).read_bytes() for name in names}
        return cls(str(folder), files, folder_sha256(folder))

    @classmethod
    def alone(cls, name: str, description: bytes, digest: str, config: dict[str, Any]) -> HuggingFaceFolder:
        """A description without a folder, with what its tokenizer_config.json would say."""
        return cls(name, {DESCRIPTION: description, CONFIG: _encoded(config)}, digest)

    @property
    def tokenizer_json(self) -> bytes:
        """The description."""
        return self.files[DESCRIPTION]

    def content(self, name: str) -> dict[str, Any]:
        """What a JSON file says; {} where there is none."""
        try:
            content = json.loads(self.files.get(name, b"{}"))
        except (ValueError, RecursionError) as error:
            raise CompressionError(f"{self.name}: {name} is not JSON, or cut short ({error})") from error
        if not isinstance(content, dict):
            raise CompressionError(f"{self.name}: {name} is not a JSON object")
        return content

    @property
    def roles(self) -> set[str]:
        """Tokens that have a role, such as ending a document."""
        contents = [self.content(name) for name in (CONFIG, "special_tokens_map.json")]
        named = (value for content in contents for role, value in content.items() if role.endswith("_token"))
        return {text for token in named if (text := _text(token)) is not None}

    @property
    def ends_documents(self) -> bool:
        """Whether a token is named that may end documents, as ``HuggingFaceTokenizer`` looks for it."""
        contents = [self.content(name) for name in (CONFIG, "special_tokens_map.json")]
        return any(_text(content.get(f"{role}_token")) for content in contents for role in ("eos", "sep"))

    @property
    def listed(self) -> set[str]:
        """Tokens that a configuration lists as special ones."""
        contents = [self.content(name) for name in (CONFIG, "special_tokens_map.json")]
        lists = (content.get(name) or () for content in contents for name in _LISTS_OF_TOKENS)
        tokens = (token for each in lists for token in (each.values() if isinstance(each, dict) else each))
        return {text for token in tokens if (text := _text(token)) is not None}

    def require_known(self, ids: dict[str, int]) -> None:
        """Raise CompressionError where a file beside tokenizer.json gives a token another id, or adds one."""
        try:
            elsewhere, named = list(self._added_elsewhere()), self.roles | self.listed
        except (AttributeError, TypeError, ValueError) as error:
            raise CompressionError(
                f"{self.name}: {CONFIG} does not describe added tokens ({error})"
            ) from error
        if unknown := sorted(named - ids.keys()):
            raise CompressionError(f"{self.name}: {CONFIG} names {unknown[0]!r}, {_LACKS}")
        for name, token, i in elsewhere:
            if token not in ids:
                raise CompressionError(f"{self.name}: {name} adds {token!r}, {_LACKS}")
            if ids[token] != i:
                raise CompressionError(
                    f"{self.name}: {name} gives {token!r} id {i}, tokenizer.json {ids[token]}"
                )

    def _added_elsewhere(self) -> Iterator[tuple[str, str, int]]:
        for token, i in self.content("added_tokens.json").items():
            yield "added_tokens.json", token, i
        for i, token in (self.content(CONFIG).get("added_tokens_decoder") or {}).items():
            yield CONFIG, _text(token) or "", int(i)

    def part(
        self, description: dict[str, Any], new_id: dict[int, int], tokens: dict[str, int]
    ) -> HuggingFaceFolder:
        """The folder of a part of the tokenizer.

        Args:
            description: its tokenizer.json.
            new_id: old id -> new id.
            tokens: added tokens and others with a role, with their new ids.
        """
        changed = {
            CONFIG: _config(self.content(CONFIG), tokens),
            "special_tokens_map.json": _without(self.content("special_tokens_map.json"), tokens),
            "added_tokens.json": {t: i for t, i in tokens.items() if t in self.content("added_tokens.json")},
            "generation_config.json": _generation(self.content("generation_config.json"), new_id),
        }
        files = {name: content for name, content in self.files.items() if name in TEMPLATES}
        files |= {
            name: _encoded(content) for name, content in changed.items() if name in (CONFIG, *self.files)
        }
        files[DESCRIPTION] = _encoded(description)
        return HuggingFaceFolder(self.name, files, _digest(files))


def refuse_others(folder: Path, names: Iterable[str]) -> None:
    """Raise CompressionError if a folder holds a tokenizer's file of none of these names.

    It would be read along with them.
    """
    for name in sorted({*HUGGINGFACE_FILES, *COMPANIONS}.difference(names)):
        if (folder / name).exists():
            raise CompressionError(f"{folder} holds another tokenizer's {name}; remove the folder")


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Puts a tokenizer's files in place, the description last."""
    refuse_others(folder, files)
    folder.mkdir(exist_ok=True)
    for name in sorted(files, key=lambda name: name == DESCRIPTION):
        write_aside(folder / name, files[name])


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _digest(files: dict[str, bytes]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        return folder_sha256(Path(folder))


def _text(token: Any) -> str | None:
    """A token's text, which configurations give as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _without(content: dict[str, Any], tokens: Container[str | None]) -> dict[str, Any]:
    """Lists of special tokens with those of ``tokens`` alone."""
    changed: dict[str, Any] = {}
    for name in _LISTS_OF_TOKENS:
        listed = content.get(name)
        if isinstance(listed, list):
            changed[name] = [token for token in listed if _text(token) in tokens]
        elif isinstance(listed, dict):
            changed[name] = {role: token for role, token in listed.items() if _text(token) in tokens}
    return content | changed


def _config(content: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """tokenizer_config.json, by which transformers takes tokenizer.json as it stands."""
    changed = _without(content, tokens)
    if described := content.get("added_tokens_decoder"):
        named = {_text(token) or "": token for token in described.values()}
        changed["added_tokens_decoder"] = {str(i): named[t] for t, i in tokens.items() if t in named}
    changed.setdefault("clean_up_tokenization_spaces", False)
    # Classes named after a model build a tokenizer of their own, with the cuts that they think are right.
    return changed | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _generation(content: dict[str, Any], new_id: dict[int, int]) -> dict[str, Any]:
    """generation_config.json with the new ids; what named ids that are gone is left out."""
    changed = {name: value for name, value in content.items() if name not in _OTHER_IDS}
    for name, value in content.items():
        if isinstance(value, list) and (name.endswith("_token_id") or name in _LISTS_OF_IDS):
            changed[name] = [new_id[i] for i in value if i in new_id]
        elif name.endswith("_token_id") and value is not None:
            changed[name] = new_id.get(value)
    return changed
