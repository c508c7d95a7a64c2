"""One thread for the tests of this room."""
from threads import one_thread

__all__ = ["one_thread"]
