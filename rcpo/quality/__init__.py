"""What a model says of preference pairs before it is trained on them: scores, their file, and the filter."""
