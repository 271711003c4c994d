"""Saliency maps (height, width): how much each region of an image contributes to a class, from 0 to 1.

Grad-CAM (Selvaraju et al. 2017) is implemented here. captum provides occlusion (Zeiler and Fergus 2014), integrated
gradients (Sundararajan et al. 2017) and GradientShap (Lundberg and Lee 2017).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from resnet_dist.errors import UsageError

Attribution = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def grad_cam(model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Grad-CAM at the last stage of a ResNet: float32 (B, H, W) in 0..1, in the size of the images.

    inputs: float32 (B, 3, H, W), normalised; classes: int64 (B,), the classes to explain. A map is all zeros if no
    region contributes to the class. The model is set to evaluation mode.
    """
    maps = class_activation(model, inputs, classes)
    return scaled(F.interpolate(maps[:, None], inputs.shape[2:], mode="bilinear", align_corners=False)[:, 0])


def class_activation(model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The positive part of layer4's channels, each weighted by the mean gradient of the class's logit, (B, h, w)."""
    seen: list[torch.Tensor] = []

    def start_gradient(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())  # earlier layers need no gradient
        return seen[0]

    hook = model.eval().get_submodule("layer4").register_forward_hook(start_gradient)
    try:
        with torch.enable_grad():
            logits = model(inputs)
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), seen[0])
    finally:
        hook.remove()
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * seen[0].detach()).sum(1).relu().float()


def occlusion(model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The drop of the logit if a square, an eighth of the side, is covered with the mean colour, (B, H, W)."""
    from captum.attr import Occlusion

    side = max(1, inputs.shape[3] // 8)
    drop = Occlusion(model).attribute(
        inputs,
        target=classes,
        sliding_window_shapes=(3, side, side),
        strides=(3, max(1, side // 2), max(1, side // 2)),
        baselines=0,
        perturbations_per_eval=16,
    )
    return _to_maps(drop)


def integrated_gradients(model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The gradient integrated over 32 steps from the mean colour to the image, (B, H, W)."""
    from captum.attr import IntegratedGradients

    attribution = IntegratedGradients(model).attribute(
        inputs, target=classes, baselines=0, n_steps=32, internal_batch_size=16
    )
    return _to_maps(attribution, _smoothing(inputs))


def gradient_shap(model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Approximate Shapley values from 32 noisy samples, (B, H, W). Baselines: the mean colour and the negative image.

    The samples are seeded, so equal images give equal maps.
    """
    from captum.attr import GradientShap

    before = np.random.get_state()
    np.random.seed(0)  # captum uses the generators of numpy and of torch
    try:
        with torch.random.fork_rng(devices=[inputs.device] if inputs.device.type == "cuda" else []):
            torch.manual_seed(0)
            rows = [
                GradientShap(model).attribute(
                    image[None],
                    baselines=torch.stack([torch.zeros_like(image), -image]),
                    target=target[None],
                    n_samples=32,
                    stdevs=0.1,
                )
                for image, target in zip(inputs, classes, strict=True)
            ]
    finally:
        np.random.set_state(before)
    return _to_maps(torch.cat(rows), _smoothing(inputs))


METHODS: dict[str, Attribution] = {
    "gradcam": grad_cam,
    "occlusion": occlusion,
    "integrated-gradients": integrated_gradients,
    "gradientshap": gradient_shap,
}


def explain(method: str, model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Saliency maps by one of METHODS, as in `grad_cam`. Raises UsageError if captum is needed and missing."""
    try:
        return METHODS[method](model.eval(), inputs, classes)
    except ModuleNotFoundError as error:
        if error.name != "captum":
            raise
        raise UsageError(f"--method {method} needs captum: pip install 'resnet-dist[explain]'") from None


def _to_maps(attribution: torch.Tensor, smooth: int = 1) -> torch.Tensor:
    """Maps from attributions (B, 3, H, W): the positive part of the sum over channels, scaled.

    Each point is the mean of `smooth` x `smooth` pixels (an odd number), because single pixels are not visible.
    """
    positive = attribution.detach().sum(1).relu().float()
    return scaled(F.avg_pool2d(positive[:, None], smooth, 1, smooth // 2, count_include_pad=False)[:, 0])


def _smoothing(inputs: torch.Tensor) -> int:
    """The odd number nearest to a thirty-second of the side."""
    return inputs.shape[3] // 64 * 2 + 1


def scaled(maps: torch.Tensor) -> torch.Tensor:
    """Scale maps (B, H, W) >= 0 by their 99.5 % point and clip at 1, so that one pixel does not darken the rest."""
    flat = maps.flatten(1)
    top = flat.kthvalue(max(1, round(0.995 * flat.shape[1])), dim=1).values.clamp_min(torch.finfo(maps.dtype).tiny)
    return (maps / top[:, None, None]).clamp(max=1)
