"""Write the best checkpoint as a folder for timm and the Hugging Face Hub, and upload it."""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config.fields import option, required
from resnet_dist.errors import MachineError, UsageError
from resnet_dist.files.outputs import inside


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Write config.json, model.safetensors and README.md for timm, transformers and the Hugging Face Hub, and a folder
    onnx for transformers.js if the run is exported. Needs `pip install 'resnet-dist[hub]'`."""

    run: str | None = option(None, positional=True)
    """The folder of a finished run."""
    output_dir: str | None = option(None, "-o", "--output")
    """The folder to write (default: hub in the run folder)."""
    license: str | None = None
    """The licence of the weights, as the Hub writes it, such as apache-2.0 (default: that of the initial weights, if
    they state one)."""
    base_model: str | None = None
    """The repository of the initial weights on the Hub, such as timm/resnet50.a1_in1k (default: that of timm's or
    torchvision's weights)."""
    dataset: str | None = None
    """The repository of the images on the Hub, such as you/ant-photos, if there is one."""
    push_to_hub: str | None = None
    """Upload the folder to this repository, such as you/ants. Needs a token (`hf auth login` or HF_TOKEN)."""
    private: bool = False
    """Make the repository private if it does not exist yet."""

    def problems(self) -> Iterator[str]:
        """What is wrong with the settings, one line each."""
        if self.run is None:
            yield "RUN is missing: a run folder"
        if self.private and self.push_to_hub is None:
            yield "--private needs --push-to-hub"
        for name in ("push_to_hub", "base_model", "dataset"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value, re.ASCII):
                yield f"--{name.replace('_', '-')} {value}: must be the name of a repository, such as you/ants"
        if self.license is not None and (self.license == "unknown" or not re.fullmatch(r"[a-z0-9.+-]+", self.license)):
            yield f"--license {self.license}: must be a licence as the Hub writes it, such as apache-2.0, or other"


@dataclass(frozen=True)
class HubFolder:
    """The folder that was written.

    Attributes:
        path: the folder.
        files: its files.
        reason: why timm cannot load it, or "".
        no_onnx: why it has no folder onnx, or "".
    """

    path: Path
    files: list[Path]
    reason: str
    no_onnx: str


def run_hub(cfg: HubConfig) -> HubFolder:
    """Write the folder, which `push` can upload. Raises UsageError, MachineError, ArtifactError."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError("hub needs huggingface_hub: pip install 'resnet-dist[hub]'")

    from resnet_dist.report.card import read_card_facts
    from resnet_dist.report.hub_folder import Publication, exported_model, why_not, write_hub_folder

    run = Path(required(cfg.run, "RUN"))
    folder = Path(cfg.output_dir) if cfg.output_dir is not None else inside(run, "hub")
    card_facts = read_card_facts(run)
    publication = Publication.of(card_facts, cfg.license, cfg.base_model, cfg.dataset)
    if publication.license is None:
        raise UsageError(
            f"--license is missing: the initial weights ({publication.start}) state none; give that of your model, "
            "such as --license apache-2.0"
        )
    export, no_onnx = exported_model(run)
    files = write_hub_folder(run, folder, card_facts, publication, export)
    return HubFolder(folder, files, "" if card_facts.is_plain else why_not(card_facts), no_onnx)


def push(hub: HubFolder, repository: str, private: bool) -> str:
    """Upload the files in one commit. The repository is created if it does not exist. Returns its URL.

    huggingface_hub reads the server and the token from HF_ENDPOINT, HF_TOKEN and `hf auth login`. Raises MachineError.
    """
    from httpx2 import HTTPError  # the HTTP client of huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    api = HfApi(library_name="resnet-dist")
    try:
        created = api.create_repo(repository, private=private or None, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=file.relative_to(hub.path).as_posix(), path_or_fileobj=file)
            for file in hub.files
        ]
        api.create_commit(created.repo_id, operations, commit_message="Upload a classifier trained by resnet-dist")
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MachineError(
            f"--push-to-hub {repository}: {reason[:300] or type(error).__name__}; the folder is written, try again"
        ) from None
    return str(created)
