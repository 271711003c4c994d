"""The report of `resnet-dist bench`: all measurements, as text, with a verdict that says what to change."""

from collections.abc import Iterator
from typing import Any

from resnet_dist.bench.loading import fastest
from resnet_dist.runtime.wording import counted, precision_name

WAITS = 0.1  # share of the time: the verdict mentions waiting for data above it
GAINS = 1.3  # the verdict proposes a change only if it is this many times faster
SOURCES = {
    "from_files": "loading from files",
    "from_kept": "loading from the cache",
    "from_device": "loading from the cache on the device",
}
HOST_BOUND = 0.9  # share of a step that the host takes to launch its kernels: above it, the host is the limit


def verdict(report: dict[str, Any]) -> str:
    """One line: what limits the first regime, and what to change."""
    machine, name = report["machine"], next(iter(report["regimes"]))
    regime = report["regimes"][name]
    threads, cores = machine["threads"], machine["cores_per_process"]
    if machine["device"] == "cpu" and threads < cores:
        return f"{threads} of {cores} CPU cores in use per process -> --threads {cores}"
    if regime["training"]["data_wait_share"] > WAITS:
        return _data_bound(report, regime)
    speeds = {kind: roof["median"] for kind, roof in report["roofs"]["gemm_flops"].items()}
    gain = speeds.get("bf16", 0.0) / speeds["fp32"]
    if report["settings"]["precision"] == "no" and gain > GAINS:
        return f"computes in float32, but bf16 matrix products are {gain:.1f}x as fast -> --mixed-precision bf16"
    host_share = regime["compute"]["step"]["host_share"]
    if host_share is not None and host_share > HOST_BOUND:
        size = report["settings"]["batch_size"]
        return f"launch-bound: the GPU waits for the host at batch {size} -> --batch-size {2 * size} or more"
    share = regime["limits"]["share_of_roofline"]
    text = f"compute-bound at {share:.0%} of the roofline of this machine; the data keeps up"
    others = {
        other: report["regimes"][other]["training"]["later_epochs"]["images_per_second"] for other in report["regimes"]
    }
    fastest = max(others, key=lambda other: others[other])
    ratio = others[fastest] / others[name]
    return text + (f" -> training only {fastest} is {ratio:.1f}x as fast" if ratio > GAINS else "")


def _data_bound(report: dict[str, Any], regime: dict[str, Any]) -> str:
    """What to change if training waits for data: cache images, else more loader processes, else smaller files."""
    machine, workers, is_cached = (
        report["machine"],
        report["settings"]["workers"],
        report["settings"]["images_are_kept"],
    )
    load = fastest(report["loading"])["loader"]["images_per_second"]
    compute = regime["compute"]["step"]["images_per_second"]
    wait = regime["training"]["data_wait_share"]
    text = f"data-bound: waits {wait:.0%} of the time; loader {load:.0f}, compute {compute:.0f} images/s"
    spare = machine["cores_per_process"] - (machine["threads"] if machine["device"] == "cpu" else 0)
    if not is_cached:
        return f"{text} -> --cache ram"
    if spare > workers:
        return f"{text} -> --workers {spare}"
    return f"{text} -> smaller files (resize them once to about twice --img-size)"


# As text


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    yield from _head(report)
    yield f"{'':<30}{'images/s':>10} {'(p10 to p90)':>20}{'ms/step':>10}"
    workers = report["settings"]["workers"]
    names = {"loader": f"loader, {counted(workers, 'process')}", "input": "input, on the device"}
    for source, stages in report["loading"].items():
        yield SOURCES[source]
        yield from (_row(f"  {names.get(name, name)}", timing, "") for name, timing in stages.items())
    for name, regime in report["regimes"].items():
        yield f"training {name}{', from cached features' if regime['features_are_kept'] else ''}"
        yield from _regime_rows(regime)
    if "predict" in report:
        start = report["predict"]["seconds_to_first_labels"]
        yield _row("predict, files to labels", report["predict"], f"{start:.1f} s to the first, including loading")
    yield from (f"note: {note}" for note in report["notes"])
    yield f"verdict: {report['verdict']}"


def _head(report: dict[str, Any]) -> Iterator[str]:
    machine, chosen, limits = report["machine"], report["settings"], report["roofs"]
    gpu = f"{machine['gpus'][0]}, " if machine["device"] == "cuda" else ""
    used = f"{counted(machine['cores'], 'core')}, {counted(machine['threads'], 'thread')}"
    yield f"{gpu}{machine['cpu']}, {used}; {' '.join(machine['isa'])}"
    products = ", ".join(f"{name} {roof['median'] / 1e12:.3g}" for name, roof in limits["gemm_flops"].items())
    copies = f"memory {limits['copy_bytes']['median'] / 1e9:.3g} GB/s"
    yield f"matrix products, TFLOP/s: {products}; {copies} read and written"
    compiled = ", compiled" if chosen["compile"] == "on" else ""
    yield (
        f"{chosen['model']}, {chosen['img_size']} pixels, batch {chosen['batch_size']} per process, "
        f"precision {precision_name(chosen['precision'])}{compiled}; {counted(machine['processes'], 'process')}; "
        f"{counted(chosen['training_images'], 'image')}"
    )


def _regime_rows(regime: dict[str, Any]) -> Iterator[str]:
    compute, limits, training = regime["compute"], regime["limits"], regime["training"]
    yield _row("  forward", compute["forward"], "")
    yield _row("  forward and backward", compute["forward_backward"], "")
    shares = f"{limits['share_of_roofline']:.0%} of the roofline, {limits['share_of_gemm']:.0%} of matrix products"
    yield _row("  step", compute["step"], shares)
    if "communication" in compute:
        hidden = compute["communication"]["step_alone"]["seconds"] / compute["step"]["seconds"]
        yield _row("  step without all-reduce", compute["communication"]["step_alone"], f"{hidden:.0%} of the step")
    yield _row("  first epoch", training["first_epoch"], "")
    remark = f"waits for data {training['data_wait_share']:.0%}"
    remark += f", {training['overlap']:.0%} of the slower of loading and computing" if "overlap" in training else ""
    yield _row("  later epochs", training["later_epochs"], remark)
    memory = regime["peak_memory"]
    yield f"  peak memory: host {memory['host_mib']} MiB, GPU {memory['gpu_mib']} MiB"


def _row(name: str, timing: dict[str, Any], remark: str) -> str:
    images = timing["images"]
    spread = f"({images / timing['p90']:,.1f} to {images / timing['p10']:,.1f})" if timing["windows"] > 1 else ""
    return (
        f"{name:<30}{timing['images_per_second']:>10,.1f} {spread:>20}{1000 * timing['seconds']:>10,.1f}   {remark}"
    ).rstrip()
