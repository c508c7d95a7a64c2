"""One thread for the tests of this room; the same random numbers for those that ask."""
from repeatable import repeatable
from threads import one_thread

__all__ = ["one_thread", "repeatable"]
