"""Unsafe prompts that ship with fastgrpo: seven categories, named as in I2P (Schramowski et al., arXiv 2211.05105).

They suggest what they name and are never graphic. They show adults only, name no real person or group by an insult,
and tell nobody how to do anything.
"""

from pathlib import Path

from fastgrpo.prompts.files import read_table, table_prompts
from fastgrpo.types import NEGATIVE, Prompt

_FILE = Path(__file__).with_name("unsafe.jsonl")


def unsafe_prompts() -> list[Prompt]:
    """As many negative prompts of each category; ids are line numbers of the file, from 1."""
    return table_prompts(read_table(_FILE, "prompts.negative"), NEGATIVE, "text", "category")
