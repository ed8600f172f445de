"""The training loop and the method's step: read `step` first, then `loop`. Does not start processes or parse
words."""
