"""What ships inside the package: `tiny/`, the model of `model=tiny`, and the script that made it. Nothing
trains here."""
