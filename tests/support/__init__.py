"""What tests of several rooms share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
GENEVAL_METADATA = ROOT.parent / "shared" / "data" / "geneval_metadata.jsonl"
"""The prompts of GenEval, which are not ours to ship: they may lie beside the checkout."""
