"""A deployment simulated step by step: which request runs when, in which KV blocks, and what its users see.

requests.py  what is asked, and what came of it
traces.py    requests from traces, replays and records of `everybit bench`
engine.py    what an engine is to a replica; engines.py: by name
ours.py      this project's own scheduler and precision ladder
vllm.py      a scheduler in the manner of vLLM's v1 engine
replica.py   engines, and the time of their steps; lockstep.py: of those that share experts
router.py    which of them gets a request
run.py       pools, links, users: `simulate`
metrics.py   the figures of `everybit bench`: `measure`
output.py    bench records and a Chrome trace
profile.py   step times from a profile of kernels
fit.py       step times fitted to measured requests
"""
