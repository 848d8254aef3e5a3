"""OpenAI-compatible HTTP over the batcher. How a request goes through:

run.py           the process: sockets, signals, what a client may leave half-said
edge.py          its id, key, host and size; jsonbody.py: what of JSON is taken; keys.py, problems.py, log.py
app.py           which path does what; answers.py: how the OpenAPI description puts the answers
fields.py        what requests may hold, what is refused and why
asking.py        from fields to what is asked of a model; served.py, opening.py: the models
completions.py, chat.py, responses.py   the three ways to ask for text, and to answer
template.py, tools.py, grammar.py       conversations, calls of functions, constraints
generation.py    a request while it runs; stream.py: as events or in one piece; text.py: tokens to what is shown
worker.py        the thread that steps the batchers; metrics.py
page/            the page at /
"""
