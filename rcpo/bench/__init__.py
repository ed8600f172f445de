"""What `rcpo bench` does: the same work in blocks, each in a process of its own, one after the other.

plan      which blocks, in which order; starts them and refuses to compare what does not agree
work      the work that all blocks share: model, token ids, reference log-probs, data order
block     the entry of a block's process, and rcpo's own training loop as a block
loops     the baselines plain and response, in plain torch
trl_loop  the baseline trl
recorder  what a block measures: seconds of each step, peak memory, first gradient, trace
profiled  one step under torch.profiler
shares    where the time of rcpo's step goes
traffic   bytes between ranks, computed
curve     memory of the head against the number of tokens
machine   what this machine is and can do
table     from blocks to a table and to JSON
"""
