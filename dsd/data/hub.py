"""What keeps a repository on the Hugging Face hub from us, told in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dsd.errors import DsdError

LOGIN = "log in with `hf auth login` or set HF_TOKEN"


@contextmanager
def reaching(
    source: str, revision: str | None, *, kind: type[DsdError], row: str = "", under: str = ""
) -> Iterator[None]:
    """What the hub's client raises, once it has tried often enough, as `kind` in one line.

    `source` is an id at `revision`; `row`, where it is known, is the row of params.yaml that has both, and `under` what
    the address of such repositories begins with. A full disk is left to those who can tell what is free.
    """
    page = f"{constants.ENDPOINT}/{under}{source}"
    asked, pinned = (f"{row}.{key}: {source}" if row else source for key in ("source", "revision"))
    try:
        yield
        return
    except GatedRepoError:
        line = f"{asked} is gated: accept its terms at {page}, then {LOGIN}"
    except RevisionNotFoundError:
        line = f"{pinned} has no commit {revision}; see {page}"
    except HfHubHTTPError as error:
        if error.response.status_code == 401 and "authorization" in error.response.request.headers:
            line = f"{asked}: the hub refuses the token (401): {LOGIN} anew, or go without it"
        elif error.response.status_code == 401 or isinstance(error, RepositoryNotFoundError):
            gone = "it was removed or renamed, or is private; if it is private"
            line = f"{asked} is neither a folder here nor at {page}: {gone}, {LOGIN}"
        else:
            line = f"{asked}: {_refusal(error)}"
    except HFValidationError:
        line = f"{asked} is neither a folder here nor the id of a repository (owner/name)"
    except LocalEntryNotFoundError as error:
        line = f"{asked} is neither a folder here nor whole in the cache, and {_refusal(error.__cause__)}"
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        line = f"{asked}: {_refusal(error)}"
    raise kind(line)


def _refusal(error: BaseException | None) -> str:
    if isinstance(error, OfflineModeIsEnabled) or error is None:
        return "HF_HUB_OFFLINE is set: unset it to fetch what is missing"
    if isinstance(error, HfHubHTTPError):
        said = " ".join((error.server_message or str(error)).split())[:160]
        return f"the hub answers {error.response.status_code}: {said}"
    if isinstance(error, OSError) and error.errno is not None:
        return str(error)
    return f"the hub does not answer: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
