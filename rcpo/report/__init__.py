"""What is made of compared runs to be looked at: the HTML report, figures for papers, the pages in W&B, and
the live table of `rcpo watch`. Computes no mean and no test: those are `rcpo.comparison`'s.

curves (a group to small arrays) -> figures (interactive), static (PDF, PNG), both in palette's colours;
fallen (the pairs that fell most), pair_ches (their CHES) -> page; dashboard; live. Only pair_ches imports
torch.
"""
