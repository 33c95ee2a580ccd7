"""Data, tokenizer, validation and rounds."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.common.flags import derived, flag
from megatron_ext.config.needs import A_MODEL_FILE, DATA, GOES_ON, HUGGING_FACE, RECORDING, ROUND, SPLIT

BLEND: dict[str, Any] = {"nargs": "*", "metavar": "[WEIGHT] PREFIX", "type": str}


@dataclass(kw_only=True)
class DataConfig:
    """Datasets written by tools/preprocess_data.py, as PREFIX without .bin or .idx."""

    data_path: list[str] | None = flag(None, **BLEND)
    """One dataset, or a blend 'weight prefix weight prefix ...', divided by --split."""

    split: str | None = flag(None, needs=[SPLIT])
    """Shares of training, validation and test, such as 949,50,1; with --data-path alone '969, 30, 1'."""

    train_data_path: list[str] | None = flag(None, **BLEND)
    """Dataset or blend to train on, in place of --data-path."""

    valid_data_path: list[str] | None = flag(None, **BLEND)
    """Dataset or blend to validate on, in place of --data-path."""

    test_data_path: list[str] | None = flag(None, **BLEND)
    """Dataset or blend to test on, in place of --data-path."""

    data_args_path: str | None = flag(None, metavar="FILE")
    """File that holds what --data-path would say."""

    per_split_data_args_path: str | None = flag(None, metavar="FILE")
    """JSON file with a blend for each of train, valid and test."""

    override_training_set: bool = flag(False, needs=[GOES_ON])
    """Go on from a checkpoint with another training set than its run had (other data, --split, --seed or
    --seq-length), read from its beginning."""

    data_cache_path: str | None = flag(None, metavar="FOLDER", needs=[DATA])
    """Where the datasets' index files go; by default beside the data."""

    mock_data: bool = False
    """Made-up token sequences, to try a layout without data."""

    seq_length: int = flag(0, default=None, minimum=1)
    """Tokens in a sequence."""

    num_workers: int = flag(2, minimum=0)
    """Processes of each rank that read data; 0 reads in the rank itself."""

    num_dataset_builder_threads: int = flag(1, minimum=1)
    """Threads that build the datasets of a blend."""

    dataloader_type: Literal["single", "cyclic", "external"] | None = flag(None, refused=["external"])
    """single goes through the samples once in order, cyclic again and again, each time shuffled."""

    mmap_bin_files: bool = flag(True, "--no-mmap-bin-files", needs=[DATA])
    """Read the .bin files instead of mapping them into memory."""

    reset_position_ids: bool = False
    """Count positions from 0 again after each end of document."""

    reset_attention_mask: bool = False
    """Attend only within a document; needs the attention mask in the dataloader."""

    eod_mask_loss: bool = False
    """Leave end of document tokens out of the loss."""

    create_attention_mask_in_dataloader: bool = flag(True, "--no-create-attention-mask-in-dataloader")
    """Do not send a mask with each batch: the attention is causal by itself."""


TOKENIZERS = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "NullTokenizer",
)
#: Megatron-LM's others.
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
    """The tokenizer that the data was made with."""

    tokenizer_type: str | None = flag(
        None, choices=[*TOKENIZERS, *OTHER_TOKENIZERS], refused=OTHER_TOKENIZERS, metavar="TYPE"
    )
    """SentencePieceTokenizer, GPTSentencePieceTokenizer, Llama2Tokenizer, HuggingFaceTokenizer or
    NullTokenizer (token numbers as they are)."""

    tokenizer_model: str | None = flag(None, metavar="PATH", needs=[A_MODEL_FILE])
    """The tokenizer's file, or for HuggingFaceTokenizer its folder or name."""

    vocab_size: int | None = flag(None, minimum=1)
    """Token numbers of NullTokenizer: 0 to N - 1, and N ends a document. With another tokenizer: the
    number of pieces that it may have at most."""

    vocab_padding: Literal["masked", "in-softmax"] | None = None
    """What rows of the vocabulary beyond the tokens do in the loss. masked: they take no part, and nothing
    depends on how many there are; in-softmax: they take part in the softmax, as in Megatron-LM. By default
    as the checkpoint that the run starts from was trained, and masked where there is none."""

    tokenizer_hf_use_fast: bool = flag(False, needs=[HUGGING_FACE])
    """The fast (Rust) form of a Hugging Face tokenizer."""

    tokenizer_hf_include_special_tokens: bool = flag(False, needs=[HUGGING_FACE])
    """Let a Hugging Face tokenizer add its special tokens to a text."""

    trust_remote_code: bool = flag(False, needs=[HUGGING_FACE])
    """Allow a Hugging Face tokenizer to run Python code from its folder."""

    make_vocab_size_divisible_by: int = flag(128, minimum=1)
    """The vocabulary is padded to a multiple of this, at every tensor parallel size alike."""

    tokenizer_sha256: str | None = derived(None)
    """Of the tokenizer's files, once it was built."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Validation while training and at the end."""

    eval_interval: int | None = flag(None, minimum=1)
    """Iterations between two validations; without it only the end is validated."""

    eval_iters: int = flag(100, minimum=0)
    """Batches of one validation; 0 does not validate."""

    skip_train: bool = False
    """Do not train: validate, and stop."""

    full_validation: bool = False
    """Validate on the whole validation set each time."""


@dataclass(kw_only=True)
class RoundsConfig:
    """Training in rounds on what the model forgot (arXiv 2402.02791, section 4.2)."""

    round_index: str | None = flag(None, metavar="PATH")
    """Train on the samples that this index selects (tools/build_round.py writes it), epoch after epoch."""

    round_schedule: Literal["restart", "continue"] = flag("restart", needs=[ROUND])
    """What a round takes from the one before, where --load holds no checkpoint of it yet: restart takes
    the weights of --pretrained-checkpoint, for a schedule from iteration 0; continue goes on with its
    iteration, optimizer and learning rate, so that --train-iters counts all rounds."""

    record_sample_loss: str | None = flag(None, metavar="PATH")
    """Write the loss of every training sample to PATH (.npy) and its manifest: with the frozen model of
    --load, without training (with the data flags of the run that trained it), or see --record-mode."""

    record_mode: Literal["frozen", "online"] = flag("frozen", needs=[RECORDING])
    """frozen: forward only with the loaded model; online: train, and write down each sample's loss as
    it is trained on."""
