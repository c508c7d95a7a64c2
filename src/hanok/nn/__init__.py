"""Parts in pure torch: no input or output, and no family is known here."""
