"""The claims of the notes as experiments, with numbers and pictures."""
