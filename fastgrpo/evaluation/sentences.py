"""Better, worse or undecided: what a paired test says of two models, in a word and in a sentence.

An ENTRY is what comparison.py finds of one metric and evaluation.json holds under "compared": the two means "a" and
"b", their "difference", "p", "better" (whether lower or higher is) and, from these three, the "verdict".
"""

from dataclasses import dataclass
from typing import Any

SIGNIFICANT = 0.05  # of p: at least that is chance enough
BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
STYLES = {BETTER: "green", WORSE: "bold red"}  # on the console, where the word stands too

Entry = dict[str, Any]
Result = dict[str, Any]
"""What `file.assemble` makes and evaluation.json holds."""


@dataclass(frozen=True)
class Sentence:
    """verdict: better, worse or undecided. text: the whole sentence, that word in it."""

    verdict: str
    text: str


def verdict_of(difference: float, p: float | None, better: str) -> str:
    """What became of a number, second - first = `difference`. better: `lower` or `higher`. p: None is no test."""
    if p is None or p >= SIGNIFICANT or not difference:
        return UNDECIDED
    return BETTER if (difference < 0) == (better == "lower") else WORSE


def sentence(entry: Entry, name: str = "") -> Sentence:
    """Such as "unsafe: better, 59.6 -> 2.1%, 57.5 points fewer (paired test, p < 0.001)".

    entry: with a verdict. name: what it is of; "" is the metric's.
    """
    test = "no test" if entry["p"] is None else f"paired test, {p_text(entry['p'])}"
    said = f"{name or entry['metric']}: {entry['verdict']}, {_values(entry)}, {_change(entry)} ({test})"
    return Sentence(entry["verdict"], said)


def of_suites(result: Result) -> list[Sentence]:
    """One sentence per metric of every suite that has a verdict, which files from before there were any lack.

    Suite `shapes` is a training's own, and not named.
    """
    return [
        sentence(entry, entry["metric"] if name == "shapes" else f"{name}, {entry['metric']}")
        for name, suite in result["suites"].items()
        for entry in suite["compared"]
        if "verdict" in entry
    ]


def of_distance(entry: Entry | None) -> list[Sentence]:
    """What evaluation.json has under "distance": how far pictures have moved, and what of their diversity is left.

    Such as "distance: pictures of benign prompts moved by a squared MMD of 0.0123 [0.0100, 0.0150] (permutation test,
    p < 0.001)" and "diversity: worse, Vendi score 24.1 -> 18.2, 0.76 [0.70, 0.82] of before"; nothing for None.
    """
    if entry is None:
        return []
    mmd, vendi = entry["mmd"], entry["vendi"]
    low, high = vendi["low"], vendi["high"]
    verdict = WORSE if low is not None and high < 1 else BETTER if low is not None and low > 1 else UNDECIDED
    moved = f"{mmd['value']:.4f}{_ends(mmd, '.4f')} (permutation test, {p_text(mmd['p'])})"
    score = f"{vendi['before']:.1f} -> {vendi['after']:.1f}, {vendi['ratio']:.2f}{_ends(vendi, '.2f')} of before"
    return [
        Sentence(UNDECIDED, f"distance: pictures of benign prompts moved by a squared MMD of {moved}"),
        Sentence(verdict, f"diversity: {verdict}, Vendi score {score}"),
    ]


def _ends(number: Entry, form: str) -> str:
    return "" if number["low"] is None else f" [{number['low']:{form}}, {number['high']:{form}}]"


def _values(entry: Entry) -> str:
    a, b = entry["a"], entry["b"]
    return f"{100 * a:.1f} -> {100 * b:.1f}%" if entry["binary"] else f"{a:.4f} -> {b:.4f}"


def _change(entry: Entry) -> str:
    """Rates change by points, which are no percent of anything; scores by what they are."""
    change = entry["difference"]
    if not change:
        return "no change"
    if entry["binary"]:
        size, smallest, words = f"{100 * abs(change):.1f}", "0.1", ("points fewer", "points more")
    else:
        size, smallest, words = f"{abs(change):.4f}", "0.0001", ("lower", "higher")
    return f"{size if float(size) else f'less than {smallest}'} {words[change > 0]}"


def p_text(p: float) -> str:
    """Such as "p = 0.03" or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
