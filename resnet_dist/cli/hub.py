"""`resnet-dist hub`: write the best checkpoint as a folder for timm and the Hugging Face Hub, and upload it."""

from resnet_dist.report.hub import HubConfig, push, run_hub

Config = HubConfig


def main(cfg: HubConfig) -> int:
    """Write the folder, upload it if asked to, and print both. Returns the exit code."""
    hub = run_hub(cfg)
    names = ", ".join(file.relative_to(hub.path).as_posix() for file in hub.files)
    how = f"timm cannot load it ({hub.reason})" if hub.reason else f"timm.create_model('local-dir:{hub.path}') loads it"
    print(f"{hub.path}: {names}; {how}")
    if hub.no_onnx:
        print(f"no onnx/ for transformers.js: {hub.no_onnx}")
    if cfg.push_to_hub is not None:
        print(f"uploaded: {push(hub, cfg.push_to_hub, cfg.private)}")
    return 0
