"""CLIP's byte-pair tokenizer (Radford et al., 2021) for models that come without one, from open_clip's vocabulary."""

from open_clip import SimpleTokenizer
from transformers import CLIPTokenizer

CONTEXT = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(pad: str = _END) -> CLIPTokenizer:
    """The tokenizer of SD 1.x (pad `<|endoftext|>`) and SD 2.x (pad `!`, id 0), with 77 tokens to a text.

    A pad token is a special one, which transformers cuts out of a text's words: "wow!" ends in the pad token of SD 2.x,
    and not, as OpenCLIP has it, in "!</w>". So it is in all programs that load SD 2.x from its diffusers folder, as in
    every folder that is written from here; a single file, which brings no tokenizer, must not be read otherwise.
    """
    clip = SimpleTokenizer()
    words = [word for word in clip.encoder if word not in ("<start_of_text>", "<end_of_text>")]
    vocabulary = {word: number for number, word in enumerate([*words, _START, _END])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(clip.bpe_ranks), model_max_length=CONTEXT, pad_token=pad)
