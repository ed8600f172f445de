"""From records to batches: reading, rendering, tokenising, filtering, laying out. Does not load models."""
