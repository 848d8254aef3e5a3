"""What `running` starts: the script is the first line of stdin, and the server ends when stdin does."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

from everybit.bench.mock.run import serve
from everybit.bench.mock.script import parse_script
from everybit.errors import SourceError


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


try:
    script = parse_script(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    serve(script)
except SourceError as error:
    print(f"mock: {error}", file=sys.stderr)
    sys.exit(2)
