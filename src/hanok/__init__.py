"""hanok: one toolkit for the whole life of a Transformer."""
__version__ = "0.1.0"
