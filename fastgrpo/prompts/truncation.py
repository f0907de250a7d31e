"""Finds prompts that are longer than a text encoder reads, and says so to the user."""

from collections.abc import Sequence
from typing import Any

from fastgrpo.system.errors import quoted


def truncated(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Indices of the texts that the tokenizer cuts off.

    tokenizer: a pipeline's (transformers, its length is model_max_length) or an open_clip model's (SimpleTokenizer or
        HFTokenizer, its length is context_length). The tokens that begin and end a text count.
    """
    length = context_length(tokenizer)
    return [index for index, tokens in enumerate(_token_counts(tokenizer, texts)) if tokens > length]


def context_length(tokenizer: Any) -> int:
    """How many tokens the tokenizer gives a text at most, with those that begin and end it."""
    return tokenizer.context_length if _is_open_clip(tokenizer) else tokenizer.model_max_length


def truncation_lines(texts: Sequence[str], text_encoder: Any, reward_encoder: Any = None) -> list[str]:
    """A sentence for each of the two encoders whose tokenizer cuts prompts off.

    text_encoder: the pipeline's tokenizer. reward_encoder: the reward's, where it reads prompts at all.
    """
    lines = []
    for name, tokenizer in (("text encoder", text_encoder), ("reward encoder", reward_encoder)):
        cut = truncated(tokenizer, texts) if tokenizer else []
        if cut:
            such_as, are, them = ("", "is", "it") if len(cut) == 1 else ("such as ", "are", "them")
            lines.append(
                f"{len(cut)} of {len(texts)} prompts, {such_as}{quoted(texts[cut[0]], 60)}, "
                f"{are} longer than the {name}'s {context_length(tokenizer)} tokens; the rest of {them} is not seen."
            )
    return lines


def _is_open_clip(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "context_length")


def _token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has; for one that fits for certain, a number that is not less."""
    if not _is_open_clip(tokenizer):
        return _lengths(tokenizer, texts)
    if hasattr(tokenizer, "tokenizer"):  # HFTokenizer, a wrapper of transformers'
        return _lengths(tokenizer.tokenizer, [tokenizer.clean_fn(text) for text in texts])
    # SimpleTokenizer is slow, and a token stands for a character or more unless cleaning adds some.
    short = [text.isascii() and "&" not in text and len(text) + 2 <= tokenizer.context_length for text in texts]
    return [len(text if fits else tokenizer.encode(text)) + 2 for text, fits in zip(texts, short, strict=True)]


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    # verbose=False: no warning of its own about the first long text.
    return [len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids] if texts else []
