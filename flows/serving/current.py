"""The served version, which changes while the server runs if its alias moves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread, Timer

import mlflow

from flows.serving.service import Service

log = logging.getLogger(__name__)
# Returns the number and the model of the version that is named now, unless it is the given one.
Newer = Callable[[str | None], tuple[str, Path] | None]


class Current:
    """The service that answers, and the number of its version."""

    def __init__(self, service: Service, number: str = "") -> None:
        self.service, self.number = service, number
        self.changed: Callable[[Current], None] = lambda current: None

    @classmethod
    def open(cls, newer: Newer) -> Current:
        """Open the version that is named now."""
        found = newer(None)
        assert found is not None  # no version is known yet
        return cls(_load(found[1]), found[0])

    def refresh(self, newer: Newer) -> None:
        """Open another version if it is named now, and let it answer; the old one answers what it has accepted."""
        if (found := newer(self.number)) is None:
            return
        number, model = found
        old, service = self.service, _load(model)
        self.service, self.number = service, number
        self.changed(self)
        log.warning("version %s takes over", number)
        # A request that has just been read may still be handed to the old one.
        end = Timer(old.settings.wait_seconds, old.rounds.close)
        end.daemon = True  # it keeps no stopped server alive
        end.start()

    def follow(self, newer: Newer, seconds: float) -> Event:
        """Look for another version every so many seconds, until the returned event is set."""
        stop = Event()

        def look() -> None:
            while not stop.wait(seconds):
                try:
                    self.refresh(newer)
                except Exception as error:
                    log.error("version %s stays: %s", self.number, error)

        Thread(target=look, name="follow", daemon=True).start()
        return stop


def _load(model: Path) -> Service:
    service: Service = mlflow.pyfunc.load_model(str(model)).unwrap_python_model()
    return service
