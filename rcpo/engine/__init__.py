"""What runs the policy: the DeepSpeed engine behind a few verbs, its files, its optimizer, its memory. Does
not own the policy, the loss or the loop."""
