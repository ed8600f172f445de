"""The typed config: composed once from conf/, validated once, resolved once. Does not read data or models."""
