"""How tokenizers spell their ids, whatever their kind."""

from megatron_ext.tokenizer.build import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer


def pieces(tokenizer: Tokenizer) -> list[str]:
    """The spelling of every id.

    Raises:
        ValueError: the tokenizer has no pieces (NullTokenizer).
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [tokenizer.processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        spelled = tokenizer.tokenizer.convert_ids_to_tokens(list(range(tokenizer.vocab_size)))
        return [f"<unused {i}>" if piece is None else piece for i, piece in enumerate(spelled)]
    raise ValueError(f"{type(tokenizer).__name__} has no pieces: its ids are numbers")


def unknown_id(tokenizer: Tokenizer) -> int:
    """The id of text that the tokenizer has no pieces for; -1 where there is none."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.processor.unk_id()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found = tokenizer.tokenizer.unk_token_id
        return -1 if found is None else found
    return -1
