"""An OpenAI-compatible server of exactly known timing that does what a script says, faults included.

script.py      what it does
asks.py        requests as they are read; refusals.py: what is refused, in OpenAI's form
forms.py       documents and events of the three ways to ask; logprobs.py: likelihoods that a precision shows in
timing.py      which bytes are written when
truth.py       what was really written when
connection.py  HTTP/1.1; server.py: requests, slots and the clock; run.py: a process of its own
"""
