"""`resnet-dist hub`: the best checkpoint as a folder that timm and the Hugging Face Hub read, and its upload."""

from resnet_dist.report.hub import HubConfig, push, run_hub

Config = HubConfig


def main(cfg: HubConfig) -> int:
    """Write the folder, upload it if that is asked for, and say so. Returns the exit code."""
    hub = run_hub(cfg)
    names = ", ".join(file.name for file in hub.files)
    how = f"timm cannot load it ({hub.reason})" if hub.reason else f"timm.create_model('local-dir:{hub.path}') loads it"
    print(f"{hub.path}: {names}; {how}")
    if cfg.push_to_hub is not None:
        print(f"uploaded: {push(hub.files, cfg.push_to_hub, cfg.private)}")
    return 0
