"""What preference pairs are before a model is trained on them: as it sees them, their scores, and the page
that shows those. Does not leave pairs out: `rcpo.data.filter` does."""
