"""What a run says: files, console, W&B, the summary, the model card and the plot. Decides nothing."""
