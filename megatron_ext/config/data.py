"""Data, tokenizer, validation and rounds."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.common.flags import derived, flag
from megatron_ext.config.needs import (
    A_MODEL_FILE,
    DATA,
    EVAL_TASKS,
    GOES_ON,
    HUGGING_FACE,
    RECORDING,
    ROUND,
    SPLIT,
)

BLEND: dict[str, Any] = {"nargs": "*", "metavar": "[WEIGHT] PREFIX", "type": str}


@dataclass(kw_only=True)
class DataConfig:
    """Datasets written by tools/preprocess_data.py, as PREFIX without .bin or .idx."""

    data_path: list[str] | None = flag(None, **BLEND)
    """One dataset, or a blend 'weight prefix weight prefix ...', divided by --split."""

    split: str | None = flag(None, needs=[SPLIT])
    """Shares of training, validation and test, such as 949,50,1; by default '969, 30, 1' with --data-path."""

    train_data_path: list[str] | None = flag(None, **BLEND)
    """Dataset or blend to train on instead of --data-path."""

    valid_data_path: list[str] | None = flag(None, **BLEND)
    """Dataset or blend to validate on instead of --data-path."""

    test_data_path: list[str] | None = flag(None, **BLEND)
    """Dataset or blend to test on instead of --data-path."""

    data_args_path: str | None = flag(None, metavar="FILE")
    """File with the words of --data-path."""

    per_split_data_args_path: str | None = flag(None, metavar="FILE")
    """JSON file with a blend for each of train, valid and test."""

    data_stages: str | None = flag(None, metavar="FILE")
    """Train in stages: a JSON list with the iteration or sample after which each begins, its blend and its
    sequence length (docs/data.md). Validation is on its share of --split, or on --valid-data-path."""

    override_training_set: bool = flag(False, needs=[GOES_ON])
    """Resume from a checkpoint with another training set than before (other data, --split, --seed or
    --seq-length), read from its beginning."""

    data_cache_path: str | None = flag(None, metavar="FOLDER", needs=[DATA])
    """Folder for the datasets' index files; by default next to the data."""

    mock_data: bool = False
    """Train on generated token sequences, to test a layout without data."""

    seq_length: int = flag(0, default=None, minimum=1)
    """Tokens in a sequence."""

    stage: str | None = derived(None)
    """The current stage of --data-stages; the data flags and seq_length are then its."""

    stage_end: int | None = derived(None)
    """The samples after which that stage ends."""

    num_workers: int = flag(2, minimum=0)
    """Data loading processes per rank; 0 loads in the rank's own process."""

    num_dataset_builder_threads: int = flag(1, minimum=1)
    """Threads that build the datasets of a blend."""

    dataloader_type: Literal["single", "cyclic", "external"] | None = flag(None, refused=["external"])
    """single reads the samples once in order; cyclic repeats them, shuffled in each epoch."""

    mmap_bin_files: bool = flag(True, "--no-mmap-bin-files", needs=[DATA])
    """Read the .bin files instead of mapping them into memory."""

    reset_position_ids: bool = False
    """Restart positions from 0 after each end of document."""

    reset_attention_mask: bool = flag(False, "--reset-attention-mask", "--dataloader-inter-document-masking")
    """Attend only within a document; each ends with its end of document token."""

    eod_mask_loss: bool = False
    """Exclude end of document tokens from the loss."""

    create_attention_mask_in_dataloader: bool = flag(True, "--no-create-attention-mask-in-dataloader")
    """Accepted for scripts of Megatron-LM: here no mask [s, s] is ever created."""

    @property
    def is_split(self) -> bool:
        """Whether --split divides the data into training, validation and test set."""
        of_stages = self.data_stages and not (self.valid_data_path or self.test_data_path)
        return bool(self.data_path or self.data_args_path or of_stages)


TOKENIZERS = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "NullTokenizer",
)
#: Megatron-LM's other tokenizers.
OTHER_TOKENIZERS = (
    "BertWordPieceLowerCase",
    "BertWordPieceCase",
    "GPT2BPETokenizer",
    "TikTokenizer",
    "MultimodalTokenizer",
    "NullMultimodalTokenizer",
    "SFTTokenizer",
)


def is_number(word: str) -> bool:
    """Whether a word of a blend is a weight and not a prefix."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def padded(pieces: int, unit: int = 128) -> int:
    """Rows of the embedding for a vocabulary: the next multiple of --make-vocab-size-divisible-by."""
    return -(-pieces // unit) * unit


@dataclass(kw_only=True)
class TokenizerConfig:
    """The tokenizer that the data was tokenized with."""

    tokenizer_type: str | None = flag(
        None, choices=[*TOKENIZERS, *OTHER_TOKENIZERS], refused=OTHER_TOKENIZERS, metavar="TYPE"
    )
    """SentencePieceTokenizer, GPTSentencePieceTokenizer, Llama2Tokenizer, HuggingFaceTokenizer or
    NullTokenizer (the text is token ids)."""

    tokenizer_model: str | None = flag(None, metavar="PATH", needs=[A_MODEL_FILE])
    """File of the tokenizer; for HuggingFaceTokenizer a folder or name."""

    vocab_size: int | None = flag(None, minimum=1)
    """For NullTokenizer: ids are 0 to N - 1, and N is the end of a document. For other tokenizers: the
    maximum number of pieces."""

    vocab_padding: Literal["masked", "in-softmax"] | None = None
    """How padding rows of the vocabulary enter the loss. masked: not at all, so that nothing depends on their
    number; in-softmax: they are part of the softmax, as in Megatron-LM. By default as in the checkpoint that
    the run starts from, or masked without one."""

    tokenizer_hf_use_fast: bool = flag(False, needs=[HUGGING_FACE])
    """Use the fast (Rust) version of a Hugging Face tokenizer."""

    tokenizer_hf_include_special_tokens: bool = flag(False, needs=[HUGGING_FACE])
    """Let a Hugging Face tokenizer add its special tokens to each text."""

    trust_remote_code: bool = flag(False, needs=[HUGGING_FACE])
    """Allow a Hugging Face tokenizer to run Python code from its folder."""

    make_vocab_size_divisible_by: int = flag(128, minimum=1)
    """Pad the vocabulary to a multiple of this, independent of the tensor parallel size."""

    tokenizer_sha256: str | None = derived(None)
    """sha256 of the tokenizer's files, set when it is built."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Validation during training and at its end."""

    eval_interval: int | None = flag(None, minimum=1)
    """Iterations between two validations; by default only at the end of the run."""

    eval_iters: int = flag(100, minimum=0)
    """Global batches per validation; 0 disables validation."""

    skip_train: bool = False
    """Validate without training."""

    full_validation: bool = False
    """Validate on the whole validation set each time."""

    eval_tasks: list[str] | None = flag(None, metavar="NAME")
    """Benchmarks to score before the first step, while training and at the end: cmmlu mmlu agieval piqa
    eprstmt c3, each by its cloze accuracy and the bits per byte of its right answers."""

    eval_tasks_interval: int | None = flag(None, minimum=1, needs=[EVAL_TASKS])
    """Iterations between two scorings of --eval-tasks."""

    eval_tasks_limit: int | None = flag(None, minimum=1, needs=[EVAL_TASKS])
    """Score so many questions of each, taken from all subjects in turn; all without it."""

    eval_tasks_data_dir: str | None = flag(None, metavar="DIR", needs=[EVAL_TASKS])
    """The folder with the benchmarks' files, as docs/evaluation.md lays them out."""


@dataclass(kw_only=True)
class RoundsConfig:
    """Multiple-round training on the samples that the model forgot (arXiv 2402.02791, section 4.2)."""

    round_index: str | None = flag(None, metavar="PATH")
    """Train on the samples selected by this index (written by tools/build_round.py), for several epochs."""

    round_schedule: Literal["restart", "continue"] = flag("restart", needs=[ROUND])
    """How a round starts if --load holds no checkpoint of it yet: restart takes only the weights of
    --pretrained-checkpoint and starts at iteration 0; continue also takes its iteration, optimizer and
    learning rate, so that --train-iters counts all rounds."""

    record_sample_loss: str | None = flag(None, metavar="PATH")
    """Write the loss of every training sample to PATH (.npy) with a manifest: of the frozen model of --load,
    without training (use the data flags of the run that trained it), or as in --record-mode."""

    record_mode: Literal["frozen", "online"] = flag("frozen", needs=[RECORDING])
    """frozen: forward only with the loaded model; online: record each sample's loss during training."""
