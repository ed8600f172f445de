"""What came out of training: answers of a model, their scores, and where the probability went. Does not
train, and does not lay runs side by side: `rcpo.comparison` does."""
