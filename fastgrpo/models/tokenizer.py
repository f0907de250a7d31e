"""CLIP's byte-pair tokenizer (Radford et al., 2021) for models that come without one, from the merges open_clip ships."""

import gzip
from functools import cache
from pathlib import Path

import open_clip
from transformers import CLIPTokenizer

CONTEXT = 77
_VOCABULARY = 49408
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(pad: str = _END) -> CLIPTokenizer:
    """The tokenizer of SD 1.x (pad `<|endoftext|>`) and SD 2.x (pad `!`, id 0), with 77 tokens to a text.

    A pad token is a special one, which transformers cuts out of a text's words: "wow!" ends in the pad token of SD 2.x,
    and not, as OpenCLIP has it, in "!</w>". So it is in all programs that load SD 2.x from its diffusers folder, as in
    every folder that is written from here; a single file, which brings no tokenizer, must not be read otherwise.

    The vocabulary's order is the 256 bytes, the bytes at the end of a word, the merges from the most frequent down,
    and the two special tokens.
    """
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=CONTEXT, pad_token=pad)


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges that make tokens of two others."""
    letters = _byte_letters()
    file = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    # The file's first line is a version, and it has more merges than CLIP uses.
    count = _VOCABULARY - 2 * len(letters) - 2
    merges = [tuple(line.split()) for line in lines[1 : 1 + count]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), _START, _END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """A visible letter for each of the 256 bytes: printable ones stand for themselves and come first.

    The rest, such as space and control bytes, are written as the letters from code point 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]
