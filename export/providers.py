"""The onnxruntime providers with which an export is verified, and what they run on."""

from collections.abc import Sequence
from typing import Any

import onnx
import onnxruntime

from export.predict import PROVIDER_OPTIONS, PROVIDERS, SHORT, ModelError, open_session, provider_names
from resnet_dist.errors import UsageError
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime.machine import cpu_model, gpu_names

# CPU flags for which onnxruntime has kernels of their own: results differ in rounding, and the speed of int8 a lot.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def providers_to_verify(asked: str) -> list[str]:
    """The short names of the providers that `--providers` names; for "auto", those with which `predict` would start.

    Raises UsageError if a provider is not part of this onnxruntime or does not start on this machine.
    """
    try:
        if asked != "auto":
            for name in (names := provider_names(asked)):
                open_session(probe(), 1, SHORT.get(name, name), "a trial")
        else:
            started = open_session(probe(), 1, "auto", "a trial").get_providers()
            names = [name for name in provider_names("auto") if name in started]
    except ModelError as error:
        raise UsageError(str(error)) from None
    return [SHORT.get(name, name) for name in names]


def probe() -> bytes:
    """A network without weights, for a session that shows which providers start."""
    value = (onnx.TensorProto.FLOAT, [1])
    given, result = (onnx.helper.make_tensor_value_info(name, *value) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", [given], [result])
    opsets = [onnx.helper.make_opsetid("", 18)]
    return bytes(onnx.helper.make_model(graph, ir_version=8, opset_imports=opsets).SerializeToString())


def runtime_of(providers: Sequence[str]) -> dict[str, Any]:
    """onnxruntime's version, and the device, CPU flags and options of each provider, as plain JSON values."""
    return {"onnxruntime": onnxruntime.__version__, "providers": {name: device_of(name) for name in providers}}


def device_of(provider: str) -> dict[str, Any]:
    """The device of a provider: the GPU, or the CPU with its flags."""
    options = PROVIDER_OPTIONS.get(PROVIDERS.get(provider, provider), {})
    if provider == "cuda":
        return {"device": next(iter(gpu_names()), "unknown GPU"), "options": options}
    flags = [flag for flag in FLAGS if flag in launcher.cpu_flags()]
    return {"device": cpu_model(), "cpu_flags": flags, "options": options}


def runtime_lines(runtime: dict[str, Any]) -> list[str]:
    """`runtime_of` as text, one line per provider."""
    lines = []
    for name, facts in runtime["providers"].items():
        details = [*facts.get("cpu_flags", []), *(f"{key}={value}" for key, value in facts["options"].items())]
        line = f"provider {name}: {facts['device']}, onnxruntime {runtime['onnxruntime']}"
        lines.append(line + (f" ({', '.join(details)})" if details else ""))
    return lines
