"""Many requests on one model: who runs in the next step, at which precision, in which KV blocks.

scheduler.py   what runs next: pure, without a clock, threads or kernels
blocks.py      which KV blocks are free, held or cached
batcher.py     the scheduler and a native model together, step by step
"""
