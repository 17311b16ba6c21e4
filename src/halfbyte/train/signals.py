"""SIGINT and SIGTERM: the first asks, the second leaves."""

import signal
import threading
from types import FrameType
from typing import Self


class StopRequest:
    """As a context it watches SIGINT and SIGTERM; calling it says whether one arrived.

    The first signal only sets the flag, which the loop reads between micro-batches. The second raises KeyboardInterrupt
    where the program stands: files are written under temporary names, so nothing half-written is left behind. Outside
    of the main thread, where Python allows no handlers, only `request` sets the flag.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self.signal_name is not None

    def request(self, name: str = "request") -> None:
        """Ask from inside the program, as a signal would."""
        self.signal_name = name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
