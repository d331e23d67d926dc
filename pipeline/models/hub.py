"""Fetching a checkpoint from the Hugging Face hub: the only network use of the models.

Apart from `weights.py`, because the hub's client takes a third of a second to import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from pipeline.errors import ModelError

_ATTEMPT_S = 10.0


def download_snapshot(
    name: str,
    revision: str | None,
    patterns: Sequence[str],
    progress: Callable[[str, int, int], None] | None = None,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """Fetch the files of `name` that match `patterns` into the hub's cache and return their directory.

    Files that are there already are not fetched again. `progress(file, bytes_done, bytes_in_all)` is called before each
    file and at the end. Every file is taken from the one commit that `revision` pointed to at the start. `endpoint` and
    `cache_dir` take the place of what HF_ENDPOINT and HF_HOME say.

    Raises:
        ModelError: if the hub cannot be reached or has no such checkpoint, revision or safetensors.
    """
    disable_progress_bars()  # the caller shows progress; two bars would fight for the line
    try:
        return _fetch(name, revision, patterns, progress, endpoint=endpoint, cache_dir=cache_dir)
    except GatedRepoError as exc:
        raise ModelError(f"{name} is gated: accept its licence on the hub, then log in with `hf auth login`") from exc
    except RevisionNotFoundError as exc:
        raise ModelError(f"{name} has no revision {revision!r}") from exc
    except RepositoryNotFoundError as exc:
        raise ModelError(f"the hub has no model {name!r}, or it is private and needs `hf auth login`") from exc
    except ModelError:
        raise
    except Exception as exc:  # the client lets through what its HTTP library raises, and that library has changed
        raise ModelError(
            f"cannot fetch {name} from the hub ({type(exc).__name__}): check the network, or copy the checkpoint to a "
            "directory of this machine and give its path as the model"
        ) from exc


def _fetch(
    name: str,
    revision: str | None,
    patterns: Sequence[str],
    progress: Callable[[str, int, int], None] | None,
    *,
    endpoint: str | None,
    cache_dir: Path | None,
) -> Path:
    info = HfApi(endpoint=endpoint).model_info(name, revision=revision, files_metadata=True, timeout=_ATTEMPT_S)
    sizes = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if any(fnmatchcase(file.rfilename, pattern) for pattern in patterns)
    }
    # Adapters, which lie in folders, are no checkpoint.
    if not any(path.endswith(".safetensors") and "/" not in path for path in sizes):
        raise ModelError(f"{name} has no model.safetensors; other weight formats can run code and are not fetched")
    num_bytes_done, num_bytes = 0, sum(sizes.values())
    directory = Path()
    for path in sorted(sizes):
        if progress is not None:
            progress(path, num_bytes_done, num_bytes)
        local = Path(hf_hub_download(name, path, revision=info.sha, endpoint=endpoint, cache_dir=cache_dir))
        directory = local.parents[path.count("/")]
        num_bytes_done += sizes[path]
    if progress is not None:
        progress("", num_bytes, num_bytes)
    return directory
