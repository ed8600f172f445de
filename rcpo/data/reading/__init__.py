"""From places to rows: files, globs, folders and hub ids, splits and slices, and the shapes that public pairs
come in. Does not judge a row or count what is dropped: `rcpo.data.records` and `rcpo.data.load` do."""
