"""From records to batches: rendering, tokenising, filtering, laying out. Reads no pairs
from files and loads no models."""
