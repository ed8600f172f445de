"""What a model says of preference pairs before it is trained on them: their scores and the page that shows
them. Does not leave pairs out: `rcpo.data.filter` does."""
