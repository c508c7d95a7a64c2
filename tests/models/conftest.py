"""The same random numbers for the tests that ask."""
from repeatable import repeatable

__all__ = ["repeatable"]
