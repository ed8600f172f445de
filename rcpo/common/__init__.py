"""Words, files and errors that every room uses: `errors`, `files`, `locks`, `console`, `code_version`.
Knows nothing of preference pairs, models or runs."""
