"""Checkpoints by name: a local folder or a repository of the Hugging Face hub, its commit, and one line for errors."""

from __future__ import annotations

import os.path
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ivtp.backbones.family import ModelError

ASSETS = Path(__file__).parents[2] / "assets"
EMBEDDED = {"tiny": ASSETS / "tiny"}
"""Checkpoints that ship with the package."""

SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Configs, processors and tokenizers."""

CODE = ["*.py"]
"""Code that a checkpoint brings along, which runs only on request."""

WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors"]
"""Weights of transformers and timm, whole or sharded; variants of other precision are left on the hub."""


@dataclass(frozen=True)
class Checkpoint:
    """Local folder of a checkpoint's files; `commit`: its revision on the hub, None where it did not come from there."""

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
    """Return whether a source exists as a path, or is spelled like none of the hub's."""
    return Path(source).is_absolute() or source.startswith((".", "~")) or source.endswith("/") or Path(source).exists()


def is_folder(source: str, revision: str | None = None) -> bool:
    """Return whether a source names a local folder, existing or not; everything else is `owner/name` on the hub.

    A missing folder inside an existing one (`weights/llava`) is a path, unless a revision says that the hub is meant.
    """
    if _is_path(source):
        return True
    parts = Path(source).parts
    return len(parts) != 2 or (revision is None and Path(parts[0]).is_dir())


def fetch(source: str, revision: str | None, patterns: Sequence[str]) -> Checkpoint:
    """Fetch the files of a checkpoint that match the patterns: from its folder, the hub or the hub's cache.

    Asks the hub once for the commit of the revision; where the hub cannot be reached, the last known one in the cache
    serves. Raises ModelError in one line.
    """
    source, revision = at_revision(source, revision)
    if is_folder(source, revision):
        folder = local(source)
        if not folder.is_dir():
            parts, hint = Path(source).parts, ""
            if not _is_path(source) and len(parts) == 2:
                hint = f" ({source} was read as a path because a folder {parts[0]!r} is here; write {source}@main for the hub's)"
            raise ModelError(
                f"model folder {folder} does not exist; give a folder with a config and *.safetensors, or a hub id "
                f"owner/name{hint}"
            )
        if revision is not None:
            raise ModelError(f"revision={revision!r} is for a hub id, but {source!r} is a local folder; leave it out")
        return Checkpoint(source, folder)
    arguments = {"repo_id": source, "revision": revision, "allow_patterns": list(patterns)}
    with one_line(source, revision):
        folder = Path(_snapshot(arguments))
    return Checkpoint(source, folder, folder.name)


def with_files(checkpoint: Checkpoint, patterns: Sequence[str]) -> Checkpoint:
    """Fetch more files of a checkpoint: from the hub, where it came from there, at its own commit."""
    return checkpoint if checkpoint.commit is None else fetch(checkpoint.source, checkpoint.commit, patterns)


def _snapshot(arguments: dict) -> str:
    """Download the files that the cache lacks, after a line that says so; a bar follows in a terminal.

    Later code reads the folder alone: every file is of one commit, and transformers does not ask its conversion service
    about a repository of pickles.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        """Progress bar that shows nothing, for the list of files and for logs."""

        def __init__(self, *given, **settings) -> None:
            super().__init__(*given, **{**settings, "disable": True})

    try:
        listed = snapshot_download(**arguments, dry_run=True, tqdm_class=Silent)
        missing = [file for file in listed if file.will_download]
    except DryRunError as unreachable:
        try:
            return snapshot_download(**arguments, local_files_only=True)
        except LocalEntryNotFoundError as error:
            raise error from unreachable
    if missing:
        size = readable(sum(file.file_size or 0 for file in missing))
        files = f"{len(missing)} files" if len(missing) > 1 else missing[0].filename
        print(
            f"fetching {arguments['repo_id']} from {constants.ENDPOINT}: {files}, {size}", file=sys.stderr, flush=True
        )
    return snapshot_download(**arguments, tqdm_class=None if missing and sys.stderr.isatty() else Silent)


def straight_to(device: str | torch.device) -> dict[str, Any]:
    """Extra `from_pretrained` arguments with which weights are read to their device, not by way of the main memory."""
    return {} if torch.device(device).type in ("cpu", "meta") else {"device_map": {"": torch.device(device)}}


def readable(size: float) -> str:
    """Format a number of bytes: 1.23 GB."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"


def explain(source: str, error: BaseException, revision: str | None = None) -> str | None:
    """Explain an error of the hub, anywhere in the chain of causes, in one line; None where there is none."""
    from huggingface_hub import constants, errors

    at = f"{source}@{revision}" if revision else source
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__

    def first(kind: type) -> Any:
        return next((one for one in chain if isinstance(one, kind)), None)

    status = getattr(getattr(first(errors.HfHubHTTPError), "response", None), "status_code", None)
    # huggingface_hub's HTTP client is httpx, since 2.0 httpx2.
    network = any(cls.__module__.startswith(("httpx", "httpcore")) for one in chain for cls in type(one).__mro__)
    if first(errors.GatedRepoError) or status == 403:
        return (
            f"{at} is gated: accept its licence at {constants.ENDPOINT}/{source}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    if first(errors.RevisionNotFoundError):
        return f"{source} has no revision {revision!r} on {constants.ENDPOINT}; give a branch, a tag or a whole commit hash"
    if first(errors.RepositoryNotFoundError) or status == 401:
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
    if first(errors.LocalEntryNotFoundError) or network:
        why = next((str(one) for one in reversed(chain) if str(one)), type(error).__name__).splitlines()[0]
        return (
            f"{at} is neither a folder here nor, whole, in the cache of the hub, and {constants.ENDPOINT} cannot be reached "
            f"({why}); check the network, a proxy (HTTPS_PROXY) or a mirror (HF_ENDPOINT); offline, give a local folder"
        )
    if first(errors.HfHubHTTPError):
        return f"{constants.ENDPOINT} answers {status} for {at}; try again later or give a local folder"
    return None


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
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(hub or f"cannot load model {where!r}: {first}") from error
