"""Find a weights file by its path, its folder in the layout of the Hugging Face Hub, or its repository there."""

import importlib.util
from pathlib import Path

from resnet_dist.errors import ArtifactError, MachineError, UsageError

HUB = "hf://"  # before the name of a repository, as huggingface_hub writes it
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def names_weights(source: str) -> bool:
    """Whether a text names a weights file, a folder of the Hub's layout or a repository, and not a run folder."""
    return source.startswith(HUB) or Path(source).suffix in SUFFIXES or (Path(source) / CONFIG).is_file()


def located(source: str) -> Path:
    """The weights file that a text names; it may not exist. A repository is downloaded once.

    Raises ArtifactError if a folder has no weights, UsageError without huggingface_hub, MachineError if the download
    fails.
    """
    if source.startswith(HUB):
        return _downloaded(source.removeprefix(HUB))
    path = Path(source)
    if not path.is_dir():
        return path
    file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if file is None:
        raise ArtifactError(f"{path}: a folder without {' or '.join(WEIGHTS)}; give a weights file")
    return file


def _downloaded(repository: str) -> Path:
    """model.safetensors of a repository in huggingface_hub's cache, with its config.json next to it.

    The cache is asked first, so that the network is not needed again. huggingface_hub reads the server and the token
    from HF_ENDPOINT, HF_TOKEN and `hf auth login`.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError(f"{HUB}{repository} needs huggingface_hub: pip install 'resnet-dist[hub]'")
    from httpx2 import HTTPError  # the HTTP client of huggingface_hub
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in (CONFIG, WEIGHTS[0]):
            cached = try_to_load_from_cache(repository, name)
            file = cached if isinstance(cached, str) else hf_hub_download(repository, name, library_name="resnet-dist")
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        raise MachineError(
            f"cannot download {HUB}{repository} ({reason}); download {CONFIG} and {WEIGHTS[0]} elsewhere and give "
            "their folder"
        ) from None
    return Path(file)
