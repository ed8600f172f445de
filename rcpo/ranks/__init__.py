"""Processes that compute together: who this one is, their collectives, signals, logs and memory. Does not
start them: `rcpo.launch` does."""
