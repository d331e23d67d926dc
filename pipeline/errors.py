"""Every error that surtitle raises on purpose.

    SurtitleError
    ├── ConfigError            a configuration value is unknown, impossible or unreadable
    │   └── RequestRefused     a parameter of a request cannot be honoured
    │       └── ModelNotLoaded the model that was asked for is not the one that answers here
    ├── MediaError             a source cannot be read or is not usable sound
    │   ├── SourceNotFound     the source does not exist
    │   ├── UploadTooLarge     a file that was sent is over the limit
    │   └── SenderReplaced     a sender's connection counts no more: a newer one took over, or the stream has ended
    ├── ModelError             weights or checkpoint cannot be used
    │   └── WeightsHashError   a weight file is not the one that was pinned
    ├── StageError             a stage failed for one snapshot
    │   └── StageUnavailable   the stage itself is gone or does not answer
    ├── StoreError             Redis refused or cannot be reached
    │   └── OwnershipLost      a newer owner has taken the stream over
    ├── ServiceError           the service cannot start or answer (port in use, no gateway)
    │   └── CapacityExceeded   admission refused a new stream
    └── StreamNotFound         no stream of that id is known

Messages say what was wrong, with the value, and what to do. Transcripts, tokens and URLs with
credentials never appear in them. Errors of other libraries are translated at the border with
`raise … from exc`. Misuse of an internal interface raises plain `ValueError` or `RuntimeError`, so that
`except SurtitleError` cannot hide a bug.
"""

from __future__ import annotations


class SurtitleError(Exception):
    """Base of all errors that are part of the program's behaviour."""


class ConfigError(SurtitleError):
    """A configuration value is unknown, impossible or unreadable."""


class RequestRefused(ConfigError):
    """A parameter of a request cannot be honoured. `parameter` is its name; None: the request as a whole."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class ModelNotLoaded(RequestRefused):
    """The model that was asked for is not the one that answers here."""


class MediaError(SurtitleError):
    """A source cannot be read, or what it carries is not usable sound or picture."""


class SourceNotFound(MediaError):
    """The source does not exist."""


class UploadTooLarge(MediaError):
    """A file that was sent is over the limit."""


class SenderReplaced(MediaError):
    """A sender's connection counts no more: a newer one took over, or the stream has ended."""


class ModelError(SurtitleError):
    """Weights or checkpoint cannot be used."""


class WeightsHashError(ModelError):
    """A weight file is not the one that was pinned."""


class StageError(SurtitleError):
    """A stage failed for one snapshot; its neighbours are not affected."""


class StageUnavailable(StageError):
    """The stage itself is gone or does not answer."""


class StoreError(SurtitleError):
    """Redis refused a write or cannot be reached."""


class OwnershipLost(StoreError):
    """A newer owner has taken the stream over; this one must stop writing."""


class ServiceError(SurtitleError):
    """The service cannot start or does not answer."""


class CapacityExceeded(ServiceError):
    """Admission refused a new stream."""


class StreamNotFound(SurtitleError):
    """No stream of that id is known."""
