"""Which prompts are longer than a text encoder reads, and what to tell the user of them."""

import textwrap
from collections.abc import Sequence
from typing import Any


def truncated(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Indices of the texts that the tokenizer cuts off.

    tokenizer: a pipeline's (transformers, its length is model_max_length) or an open_clip model's (SimpleTokenizer or
        HFTokenizer, its length is context_length). The tokens that begin and end a text count.
    """
    length = context_length(tokenizer)
    return [index for index, tokens in enumerate(_token_counts(tokenizer, texts)) if tokens > length]


def context_length(tokenizer: Any) -> int:
    """Tokens that the tokenizer gives a text at most, with those that begin and end it."""
    return tokenizer.context_length if _is_open_clip(tokenizer) else tokenizer.model_max_length


def truncation_lines(texts: Sequence[str], text_encoder: Any, reward_encoder: Any = None) -> list[str]:
    """What to say of prompts that are cut off: a line for the tokenizer of each encoder that cuts any.

    text_encoder: the pipeline's tokenizer. reward_encoder: the reward's, where it reads prompts at all.
    """
    lines = []
    for name, tokenizer in (("text encoder", text_encoder), ("reward's encoder", reward_encoder)):
        cut = truncated(tokenizer, texts) if tokenizer else []
        if cut:
            lines.append(
                f"{len(cut)} of {len(texts)} prompts are longer than the {name}'s {context_length(tokenizer)} tokens; "
                f"the rest of them is not seen, such as {textwrap.shorten(texts[cut[0]], 60, placeholder='...')!r}"
            )
    return lines


def _is_open_clip(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "context_length")


def _token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    if not _is_open_clip(tokenizer):
        return _lengths(tokenizer, texts)
    if hasattr(tokenizer, "tokenizer"):  # HFTokenizer, a wrapper of transformers'
        return _lengths(tokenizer.tokenizer, [tokenizer.clean_fn(text) for text in texts])
    return [len(tokenizer.encode(text)) + 2 for text in texts]


def _lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    # verbose=False: no warning of its own about the first long text.
    return [len(ids) for ids in tokenizer(list(texts), verbose=False).input_ids] if texts else []
