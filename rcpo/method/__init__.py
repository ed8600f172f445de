"""The paper: incentives, scores, band, calibrators, and every metric's definition. Knows no engine and no
files."""
