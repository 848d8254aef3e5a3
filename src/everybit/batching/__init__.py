"""Many requests on one model: who runs in the next step, at which precision, in which KV blocks.

scheduler.py   what runs next: pure, without a clock, threads or kernels
blocks.py      which KV blocks are free, held or cached
fluidity.py    when tokens are due, and how many were late
precision.py   what `auto` gets: as many bits as are in time
pacing.py      how much a step holds, and at which precision, so that nobody waits: also the planner's rules
speculation.py which tokens are guessed beforehand; ngrams.py: from the text itself
batcher.py     the scheduler and a native model together, step by step
"""
