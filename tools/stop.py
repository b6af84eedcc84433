"""Ctrl-C and SIGTERM."""

import contextlib
import signal
from collections.abc import Iterator

from errors import info


class Stop:
    """Ctrl-C and SIGTERM: the first lets the running step finish, the second ends at once."""

    is_asked = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(kind, self.ask) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before):
                signal.signal(kind, handler)

    def ask(self, *signal_and_frame: object) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        info("generate.py: stopping after this step")
