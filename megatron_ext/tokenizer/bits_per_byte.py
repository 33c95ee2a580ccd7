"""UTF-8 bytes that each token id stands for: what turns a loss in nats a token into bits per byte.

Losses of two tokenizers cannot be compared, bits per byte can: the summed loss of a text in bits,
divided by the bytes of that text (as nanochat's evaluate_bpb does it).
"""

from collections.abc import Iterable

import numpy as np

SPACE = "▁"  # sentencepiece writes a blank as U+2581


def sentencepiece_bytes(processor) -> np.ndarray:
    """Bytes of each piece of a ``SentencePieceProcessor``, int32 [vocabulary].

    A byte piece is one byte, a blank one, and control and unknown pieces stand for no text. Pieces
    that are never produced (fillers) keep the bytes of their text. What a text had before sentencepiece
    normalized it cannot be told from ids: U+2581 counts as the blank that it becomes, the blank in front
    of a text as one byte.
    """
    silent = {i for i in range(len(processor)) if processor.is_control(i) or processor.is_unknown(i)}
    byte = {i for i in range(len(processor)) if processor.is_byte(i)}
    pieces = (processor.id_to_piece(i) for i in range(len(processor)))
    return np.array(
        [0 if i in silent else 1 if i in byte else text_bytes(piece) for i, piece in enumerate(pieces)],
        dtype=np.int32,
    )


def huggingface_bytes(tokenizer) -> np.ndarray:
    """Bytes of each id of a Hugging Face tokenizer, int32 [vocabulary]; 0 for special tokens.

    Knows the two families in use: byte-level BPE, where one character of a piece is one byte, and
    pieces in sentencepiece's manner, with byte fallback.
    """
    special = set(tokenizer.all_special_ids)
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = set(tokenizer.get_added_vocab())
    byte_level = _is_byte_level(pieces)
    bytes_of = []
    for token_id, piece in enumerate(pieces):
        if piece is None or token_id in special:
            bytes_of.append(0)
        elif piece in added:
            bytes_of.append(len(piece.encode()))
        elif byte_level:
            bytes_of.append(len(piece))
        else:
            bytes_of.append(1 if _is_byte_piece(piece) else text_bytes(piece))
    return np.array(bytes_of, dtype=np.int32)


def text_bytes(piece: str) -> int:
    """UTF-8 bytes of a piece in sentencepiece's spelling."""
    return len(piece.replace(SPACE, " ").encode())


def _is_byte_piece(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _is_byte_level(pieces: Iterable[str | None]) -> bool:
    """GPT-2's alphabet writes a blank as U+0120; sentencepiece's pieces begin with U+2581."""
    starts = [piece[0] for piece in pieces if piece]
    return starts.count("\u0120") > starts.count(SPACE)
