"""Ctrl-C and SIGTERM: a run ends between two decisions, or, where that takes too long, wherever it is."""

import os
import shlex
import signal
import socket
import sys
import threading


class Stop:
    """Ctrl-C and SIGTERM set a flag that the loop reads after every decision; a second one ends the process at once.

    Until `begin` nothing is worth saving, and the first one interrupts whatever is being built or loaded.
    """

    GRACE = 10.0  # seconds from the first signal until the process ends wherever it is

    def __init__(self, out, print0=print):
        self.hint = f"stopped; every finished iteration is saved. Go on with: python train.py --resume {shlex.quote(str(out))}"
        self.begun = self.requested = False
        self.print0 = print0  # of several ranks, one speaks
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._request)

    def begin(self):
        # Python runs handlers between two bytecodes of the main thread, so never while that thread hangs in a driver.
        # But the number of each signal comes out of this socket at once, where another thread waits for it.
        self._alarm = socket.socketpair()
        self._alarm[1].setblocking(False)
        signal.set_wakeup_fd(self._alarm[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._guard, daemon=True).start()
        self.begun = True

    def check(self, *_):
        """Leave whatever is running, if somebody asked for it."""
        if self.requested:
            raise KeyboardInterrupt

    def _request(self, number, frame):
        if not self.begun:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self.print0("\nstopping after this decision (once more: at once)", file=sys.stderr, flush=True)

    def _guard(self):
        """End the process at the second signal at once, and some time after the first wherever it is."""
        self._next_signal()
        late = threading.Timer(self.GRACE, self._leave)
        late.daemon = True
        late.start()
        os._exit(128 + self._next_signal())  # workers leave by themselves when their pipe closes

    def _next_signal(self):
        while (number := self._alarm[0].recv(1)[0]) not in (signal.SIGINT, signal.SIGTERM):
            pass
        return number

    def _leave(self):
        self.print0(self.hint, file=sys.stderr, flush=True)
        os._exit(130)
