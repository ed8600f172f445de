"""The policy and what runs it: loading, checks, the chunked head, adapters, the DeepSpeed engine. Does not
own the loss."""
