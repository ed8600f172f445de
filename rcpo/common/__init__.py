"""Words, files and errors that every room uses: `errors`, `files`, `locks`, `console`, `source`. Knows
nothing of preference pairs, models or runs."""
