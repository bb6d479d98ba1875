"""Checkpoints by name: a local folder or a repository of the Hugging Face hub, its commit, and one line for errors."""

from __future__ import annotations

import os.path
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ivtp.backbones import ModelError

SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Configs, processors and tokenizers."""

CODE = ["*.py"]
"""Of a checkpoint that brings its own, which runs only on request."""

WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors"]
"""Of transformers and timm, whole or sharded; variants of other precision are left on the hub."""


@dataclass(frozen=True)
class Checkpoint:
    """A local folder of a checkpoint's files; `commit`: its revision on the hub, None where it did not come from there."""

    source: str
    folder: Path
    commit: str | None = None


def at_revision(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """A source and its revision, which may be spelled inside it: `owner/name@revision`."""
    if "@" not in source or _is_path(source):
        return source, revision
    name, _, inside = source.partition("@")
    if not name or not inside or "@" in inside:
        raise ModelError(
            f"source {source!r} is not understood; write owner/name@revision, with one branch, tag or commit"
        )
    if revision not in (None, inside):
        raise ModelError(
            f"source {source!r} names revision {inside!r}, but revision={revision!r} is given too; keep one"
        )
    return name, inside


def local(source: str) -> Path:
    """A source read as a path; `~` is the home directory."""
    return Path(os.path.expanduser(source))  # Path.expanduser raises for an unknown user


def _is_path(source: str) -> bool:
    """Whether a source exists as a path, or is spelled like none of the hub's."""
    return Path(source).is_absolute() or source.startswith((".", "~")) or source.endswith("/") or Path(source).exists()


def is_folder(source: str, revision: str | None = None) -> bool:
    """Whether a source names a local folder, existing or not; everything else is `owner/name` on the hub.

    A missing folder inside an existing one (`weights/llava`) is a path, unless a revision says that the hub is meant.
    """
    if _is_path(source):
        return True
    parts = Path(source).parts
    return len(parts) != 2 or (revision is None and Path(parts[0]).is_dir())


def fetch(source: str, revision: str | None, patterns: Sequence[str]) -> Checkpoint:
    """The files of a checkpoint that match the patterns: in its folder, or from the hub or its cache.

    Asks the hub once for the commit of the revision; where the hub cannot be reached, the last known one in the cache
    serves. Raises ModelError in one line.
    """
    source, revision = at_revision(source, revision)
    if is_folder(source, revision):
        folder = local(source)
        if not folder.is_dir():
            raise ModelError(
                f"model folder {folder} does not exist; give a folder with a config and *.safetensors, or a hub id "
                f"owner/name{_on_the_hub(source)}"
            )
        if revision is not None:
            raise ModelError(f"revision={revision!r} is for a hub id, but {source!r} is a local folder; leave it out")
        return Checkpoint(source, folder)
    wanted = {"repo_id": source, "revision": revision, "allow_patterns": list(patterns)}
    with one_line(source, revision):
        folder = Path(_snapshot(wanted))
    return Checkpoint(source, folder, folder.name)


def _on_the_hub(source: str) -> str:
    """Hint at the spelling that means the hub, for `owner/name` beside a folder of the owner's name."""
    if _is_path(source) or len(Path(source).parts) != 2:
        return ""
    owner = Path(source).parts[0]
    return f" ({source} was read as a path because a folder {owner!r} is here; write {source}@main for the hub's)"


def with_files(checkpoint: Checkpoint, patterns: Sequence[str]) -> Checkpoint:
    """A checkpoint with more of its files: from the hub, where it came from there, at its own commit."""
    return checkpoint if checkpoint.commit is None else fetch(checkpoint.source, checkpoint.commit, patterns)


def _snapshot(wanted: dict) -> str:
    """Download what the cache lacks, and say so first: in a terminal a bar follows, a log has this line alone.

    All later reading is from the folder, so that every file is of one commit, and transformers, which would ask a
    conversion service about a repository of pickles alone, asks nobody.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        """No bar: of a look at the list of files, and in a log."""

        def __init__(self, *given, **settings) -> None:
            super().__init__(*given, **{**settings, "disable": True})

    try:
        listed = snapshot_download(**wanted, dry_run=True, tqdm_class=Silent)
        missing = [file for file in listed if file.will_download]
    except DryRunError as unreachable:
        try:
            return snapshot_download(**wanted, local_files_only=True)
        except LocalEntryNotFoundError as error:
            raise error from unreachable
    if missing:
        size = readable(sum(file.file_size for file in missing))
        files = f"{len(missing)} files" if len(missing) > 1 else missing[0].filename
        print(f"fetching {wanted['repo_id']} from {constants.ENDPOINT}: {files}, {size}", file=sys.stderr, flush=True)
    return snapshot_download(**wanted, tqdm_class=None if missing and sys.stderr.isatty() else Silent)


def readable(size: float) -> str:
    """A number of bytes as people read it."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def explain(source: str, error: BaseException, revision: str | None = None) -> str | None:
    """One line for an error of the hub, wherever in the chain of causes it is; None where none is."""
    from huggingface_hub import constants, errors

    at = f"{source}@{revision}" if revision else source
    chain, here = [], error
    while here is not None and here not in chain:
        chain.append(here)
        here = here.__cause__ or here.__context__

    def first(*kinds: type) -> BaseException | None:
        return next((one for one in chain if isinstance(one, kinds)), None)

    if first(errors.GatedRepoError) or _status(first(errors.HfHubHTTPError)) == 403:
        return (
            f"{at} is gated: accept its licence at {constants.ENDPOINT}/{source}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    if first(errors.RevisionNotFoundError):
        return f"{source} has no revision {revision!r} on {constants.ENDPOINT}; give a branch, a tag or a whole commit hash"
    if first(errors.RepositoryNotFoundError) or _status(first(errors.HfHubHTTPError)) == 401:
        return (
            f"{source} is neither a folder here nor a repository of {constants.ENDPOINT} that you may read; check the "
            "spelling, and log in with `hf auth login` if it is private"
        )
    if first(errors.HFValidationError):
        return f"{source!r} is neither a folder here nor a hub id (owner/name)"
    if first(errors.OfflineModeIsEnabled):
        return (
            f"{at} is neither a folder here nor, whole, in the cache of the hub, and HF_HUB_OFFLINE forbids to fetch it; "
            "offline, give a local folder or run once online"
        )
    if first(errors.LocalEntryNotFoundError) or _network(chain):
        why = next((str(one) for one in reversed(chain) if str(one)), type(error).__name__).splitlines()[0]
        return (
            f"{at} is neither a folder here nor, whole, in the cache of the hub, and {constants.ENDPOINT} cannot be reached "
            f"({why}); check the network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT); offline, give a local folder"
        )
    if failed := first(errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} answers {_status(failed)} for {at}; try again later or give a local folder"
    return None


def _status(error) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _network(chain: Sequence[BaseException]) -> bool:
    """Whether the HTTP client of huggingface_hub (httpx, since 2.0 httpx2) failed."""
    return any(cls.__module__.startswith(("httpx", "httpcore")) for one in chain for cls in type(one).__mro__)


@contextmanager
def one_line(where: str, revision: str | None = None) -> Iterator[None]:
    """Turn the errors of a loader (a file that is missing, truncated or not what it says) into a ModelError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        hub = explain(where, error, revision)
        loading = (OSError, ValueError, RuntimeError, KeyError, AssertionError, ImportError, SafetensorError)
        if hub is None and not isinstance(error, loading):
            raise
        raise ModelError(hub or reason(where, error)) from error


def reason(where: str, error: Exception) -> str:
    """One line out of a loader's error."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"cannot load model {where!r}: {first}"
