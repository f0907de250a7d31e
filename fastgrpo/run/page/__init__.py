"""The page that shows what runs have come to: one HTML file that opens offline (document.py)."""
