"""Measures any OpenAI-compatible endpoint as its users feel it, over HTTP; imports nothing of ours but `errors`.

A run goes through these files, in this order:

    endpoint, asks       where requests go, and their bodies
    load/                what is sent and when: arrivals, lengths, texts, traces, workloads
    preflight            a look at the endpoint before
    runner, worker       processes that send and note when bytes come; http, loop: with what
    answers, sse, tokens what the bytes said, read after the answer has ended
    records              what was seen of each request
    targets, metrics     what it is worth: fluidity, ideal, statistics, energy
    measuring            one run from its settings to its document
    result, schema.json  the document; card, progress: on the terminal; report/: as HTML

    series, search       several runs: sweep, capacity, compare, sustain
    audit                does an endpoint serve the precision it claims?
    mock/, selftest      a server of exactly known timing, and the bench's own error against it
"""
