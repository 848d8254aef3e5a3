"""The server as replicas on Ray Serve, on one machine: `everybit serve OVERLAY --ray --replicas 2`.

Each replica is a process with the whole server in it (its own worker, batcher and KV cache); the planes are mapped, so
that replicas share their pages. Serve's HTTP proxy stands in front and gives a request to the less busy of two.

    driver    starts and ends Ray and Serve; the process of the command
    door      in Serve's proxy: keys, limits, and errors in OpenAI's form
    replica   the server inside a Serve replica
    peers     what concerns all replicas: metrics, status, the switch of a request that runs somewhere
    log       one log for all processes

Needs: ray[serve] 2.52 or newer (the extra `ray`), which brings neither torch nor transformers.
"""

from __future__ import annotations
