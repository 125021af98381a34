"""Signals that ask a run to stop: it saves, and leaves with status 0."""

import signal
from types import FrameType, TracebackType


class Interrupt:
    """Within this context SIGTERM and SIGINT set ``requested``; a second SIGINT interrupts.

    SIGTERM may be sent several times (a scheduler signals a job and its steps) and never kills.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._before = {int(number): signal.getsignal(number) for number in self.SIGNALS}
        for number in self.SIGNALS:
            signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            # not the handler before: a shell starts background jobs with SIGINT ignored
            signal.signal(number, signal.default_int_handler)
