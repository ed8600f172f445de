"""The policy: loading, checks, the forward pass, the chunked head, adapters. Does not own what steps it, or
the loss."""
