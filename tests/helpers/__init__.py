"""What tests share: inputs, models, oracles, runs of many ranks, servers. Holds no test."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The source tree."""
