"""A run on disk: its folder, its rows, its frozen config. Imports no torch (but for `frozen`), so that
`rcpo status` is quick."""
