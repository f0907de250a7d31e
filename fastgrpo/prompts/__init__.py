"""Prompts: where they come from (loading.py), which of them an iteration gets (source.py), their embeddings.

`load_prompts` reads files (files.py), data sets of the Hugging Face hub (hub.py) and the sets that ship with fastgrpo:
`geneval` (geneval.py), `unsafe` (unsafe.jsonl) and the captions of `fastgrpo.shapes`. truncation.py says which prompts
a tokenizer cuts off.
"""

from fastgrpo.prompts.embedding import embed
from fastgrpo.prompts.loading import load_prompts
from fastgrpo.prompts.source import PromptSource
from fastgrpo.prompts.truncation import truncated, truncation_lines

__all__ = ["PromptSource", "embed", "load_prompts", "truncated", "truncation_lines"]
