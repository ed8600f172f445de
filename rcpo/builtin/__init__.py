"""What ships inside the package: `tiny/`, the model of `model=tiny`, `tiny_vision/`, that of
`model=tiny_vision`, and the scripts that made them. Nothing trains here."""
