"""An event loop whose timers are not late, for the workers and the mock server."""

from __future__ import annotations

import asyncio
import select
import selectors
import sys

if sys.platform == "linux":

    class _Exact(selectors.EpollSelector):
        """epoll waits whole milliseconds, so asyncio's timers are up to 1 ms late; select waits microseconds.

        An epoll descriptor can be read when one of its own can, so select has but one to watch.
        """

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            if timeout is None or timeout <= 0 or self.fileno() >= 1024:  # more than select can watch
                return super().select(timeout)
            select.select([self.fileno()], [], [], timeout)
            return super().select(0)

    def exact_loop() -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(_Exact())

else:
    exact_loop = asyncio.new_event_loop
