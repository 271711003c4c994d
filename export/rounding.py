"""Round weights to few bits so that the outputs of a layer change little.

Rounding each weight to the nearest value makes errors that add up, because the inputs of a layer are correlated. Here
the error of each weight is passed on to the weights of the layer that are not yet rounded (GPTQ, Frantar et al. 2022,
https://arxiv.org/abs/2210.17323): they change so that the layer's output on measured inputs stays as it was.
"""

import numpy as np
import torch

BLOCK = 576  # weights of an output among which errors are passed on
COLUMNS = 32
DAMPING = 0.01


def rounded_weights(weights: torch.Tensor, rows: torch.Tensor, groups: int, largest: int) -> torch.Tensor:
    """Weights (outputs, ...) that lie on the grid of int8, and give nearly the same outputs on `rows` (n, K).

    The grid of an output channel has steps of its largest weight / `largest`. That weight stays as it is: onnxruntime
    takes its steps from the largest weight, so it finds the same grid with every weight on it.
    """
    flat = weights.reshape(len(weights), -1)
    step = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(flat.dtype).tiny) / largest
    scaled, width = flat / step, flat.shape[1]
    count = -(-width // BLOCK)
    each = -(-width // count)
    padding = (0, count * each - width)

    def blocks(values: torch.Tensor) -> torch.Tensor:
        """(groups, n, width) to (groups * count, each, n)."""
        padded: torch.Tensor = torch.nn.functional.pad(values, padding)
        return padded.reshape(groups, -1, count, each).permute(0, 2, 3, 1).reshape(groups * count, each, -1)

    inputs = rows.reshape(-1, groups, width).transpose(0, 1)
    integers = round_blocks(blocks(scaled.reshape(groups, -1, width)), blocks(inputs), largest)
    outputs = integers.reshape(groups, count, each, -1).permute(0, 3, 1, 2)
    result = outputs.reshape(len(weights), count * each)[:, :width]
    top = flat.abs().argmax(1, keepdim=True)
    result = result.scatter(1, top, largest * scaled.gather(1, top).sign())
    return (result * step).reshape(weights.shape)


def round_blocks(left: torch.Tensor, inputs: torch.Tensor, largest: int) -> torch.Tensor:
    """Integers from -largest to largest for `left` (blocks, K, outputs), given inputs (blocks, K, n)."""
    products = inputs @ inputs.transpose(1, 2) / inputs.shape[2]
    diagonal = torch.eye(products.shape[1])
    products += diagonal * (DAMPING * products.diagonal(dim1=1, dim2=2).mean() + 1e-8)
    factor = torch.linalg.cholesky(products.flip(1, 2)).flip(1, 2)  # upper, and factor @ factor.T is products
    share = torch.linalg.solve_triangular(factor, diagonal.expand_as(factor), upper=True)
    share = share / share.diagonal(dim1=1, dim2=2)[:, :, None]  # row k: what the weights after k get of its error
    rest, passed = left.clone().numpy(), share.numpy()  # torch would use threads for each small step
    result = np.empty_like(rest)
    for start in range(0, rest.shape[1], COLUMNS):
        end = min(start + COLUMNS, rest.shape[1])
        errors = np.empty((len(rest), end - start, rest.shape[2]), np.float32)
        for k in range(start, end):
            result[:, k] = np.clip(np.rint(rest[:, k]), -largest, largest)
            errors[:, k - start] = rest[:, k] - result[:, k]
            rest[:, k + 1 : end] -= passed[:, k, k + 1 : end, None] * errors[:, k - start, None]
        rest[:, end:] -= passed[:, start:end, end:].transpose(0, 2, 1) @ errors
    return torch.from_numpy(result)
