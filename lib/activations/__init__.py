"""Activations: harvest them from models, shuffle, keep on disk, normalise.

Import from the submodules: only `harvest` and its backends need transformers.
"""
