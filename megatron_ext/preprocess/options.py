"""What a preprocessing run is asked to do, and what makes two runs the same."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.common.files import sha256
from megatron_ext.config.data import TokenizerConfig
from megatron_ext.data.indexed import dataset_files
from megatron_ext.data.text.sources import BAD_LINES, STDIN, WORK_FOLDER, Source

MIB = 1 << 20
#: Raised when parts of older code must not be mixed with those of newer code.
PLAN_VERSION = 3


class PreprocessError(ValueError):
    """The input cannot be used; the message names the file and the line."""


@dataclass
class Options:
    """A preprocessing run.

    Attributes:
        output_prefix: PREFIX of ``PREFIX_KEY_document``.
        on_bad_line: "stop", "skip" or "quarantine".
        shard: (i, n) makes the i-th (from 0) of n parts of the input.
        tokenizer_backend: what encodes with a Hugging Face tokenizer: "auto" or "tokenizers".
        chunk_bytes: input bytes of a unit of work; chosen from the size of the input if None.
    """

    inputs: list[str]
    output_prefix: str
    tokenizer: TokenizerConfig
    tokenizer_backend: str = "auto"
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    append_eod: bool = False
    on_bad_line: str = "stop"
    dedup: bool = False
    shard: tuple[int, int] | None = None
    workers: int = 1
    log_interval: int = 1000
    chunk_bytes: int | None = None

    def problems(self) -> list[str]:
        """What cannot be meant, by the names of the flags."""
        keys, kind, found = self.json_keys, self.tokenizer.tokenizer_type, []
        if kind == "NullTokenizer" and self.tokenizer.vocab_size is None:
            found.append(f"--tokenizer-type {kind} needs --vocab-size")
        if kind != "NullTokenizer" and self.tokenizer.vocab_size is not None:
            found.append("--vocab-size cannot take effect: needs --tokenizer-type NullTokenizer")
        if kind != "NullTokenizer" and self.tokenizer.tokenizer_model is None:
            found.append(f"--tokenizer-type {kind} needs --tokenizer-model")
        if kind != "HuggingFaceTokenizer" and self.tokenizer_backend != "auto":
            found.append(f"--tokenizer-backend {self.tokenizer_backend} is for HuggingFaceTokenizer")
        if self.shard and self.dedup:
            found.append("--dedup looks at all documents, --shard only at a part: give one of them")
        if self.shard and "-" in self.inputs:
            found.append("--shard needs input files, standard input cannot be divided")
        if self.inputs.count("-") > 1:
            found.append("--input: standard input can be read once")
        if len(set(keys)) < len(keys):
            found.append("--json-keys: a key is given twice")
        if bad := [key for key in keys if not key or "/" in key]:
            found.append(
                f"--json-keys {bad[0]!r}: becomes part of a file name, and cannot hold '/' or be empty"
            )
        return found

    @property
    def prefix(self) -> str:
        """The output prefix, with the shard's number in it if there is one."""
        if self.shard is None:
            return self.output_prefix
        return f"{self.output_prefix}_{self.shard[0]:05d}-of-{self.shard[1]:05d}"

    def dataset(self, key: str) -> str:
        """Prefix of the dataset of one JSON key."""
        return f"{self.prefix}_{key}_document"

    @property
    def work_folder(self) -> Path:
        """Where finished parts wait for the end of the run."""
        return Path(f"{self.prefix}{WORK_FOLDER}")

    @property
    def bad_lines_file(self) -> Path:
        return Path(f"{self.prefix}{BAD_LINES}")

    def produced(self) -> list[Path]:
        """All that a run writes, or removes."""
        files = [path for key in self.json_keys for path in dataset_files(self.dataset(key))]
        return [*files, self.work_folder, self.bad_lines_file]

    def files_read(self, sources: list[Source]) -> list[str]:
        """All that a run reads and that has a name."""
        names = [source.path for source in sources if source.path != STDIN]
        return [*names, *filter(None, [self.tokenizer.tokenizer_model])]

    def describe(self) -> dict[str, Any]:
        """The options that decide the output, for the manifest."""
        return {
            "json_keys": self.json_keys,
            "append_eod": self.append_eod,
            "on_bad_line": self.on_bad_line,
            "dedup": self.dedup,
            "shard": list(self.shard) if self.shard else None,
        }


def chunk_size(options: Options, sources: list[Source]) -> int:
    """Bytes of a chunk: the same for any number of workers, so that a run resumes with another."""
    if options.chunk_bytes:
        return options.chunk_bytes
    total = sum(source.bytes or 0 for source in sources)
    return max(MIB // 4, min(16 * MIB, total // 64)) if total else 4 * MIB


def plan_id(options: Options, sources: list[Source], tokenizer_sha256: str) -> str:
    """Hash of everything that decides the parts; parts of another plan are not reused."""
    # Size and time of change; nothing is known of pipes.
    inputs = [[source.path, *(source.state or (None, None))[:2]] for source in sources]
    facts = {
        "version": PLAN_VERSION,
        "options": options.describe(),
        "tokenizer": tokenizer_sha256,
        "include_special_tokens": options.tokenizer.tokenizer_hf_include_special_tokens,
        "tokenizer_backend": options.tokenizer_backend,
        "chunk_bytes": chunk_size(options, sources),
        "inputs": inputs,
    }
    return sha256(json.dumps(facts))
