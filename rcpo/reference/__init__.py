"""What displacement is measured against: reference log-probs, computed once and shared, or from a live model.
Does not train anything."""
