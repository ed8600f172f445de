"""From places to records: files, globs, folders and hub ids, the shapes that public pairs come in, bad rows
and what became of them. Knows no tokenizer and no chat template."""
