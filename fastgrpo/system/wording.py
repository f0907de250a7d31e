"""Texts of any length in messages, which are to stay readable."""

LONGEST_QUOTE = 80  # letters of a prompt in a sentence
LONGEST_LINE = 2000  # letters of a sentence


def quoted(text: str, most: int = LONGEST_QUOTE) -> str:
    """A text in quotation marks, on one line, at most `most` of its letters and then an ellipsis."""
    return repr(cut(" ".join(text[: 4 * most].split()), most))


def cut(text: str, most: int) -> str:
    """The text, or its first `most` letters and an ellipsis."""
    return text if len(text) <= most else f"{text[:most].rstrip()}..."


def cut_middle(text: str, most: int = LONGEST_LINE) -> str:
    """The text, or how it begins and ends with an ellipsis between: a sentence says what is wrong first, what to do last."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half].rstrip()} ... {text[-half:].lstrip()}"
