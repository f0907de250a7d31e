"""The protocols of an evaluation: which images a suite wants, what looks at them, and which tables come of it.

Nothing is re-exported: reading results back needs no diffusers, which takes seconds to import.
"""
