"""The network: torchvision's ResNets, heads, weights, checkpoints, trainable parts. Independent of `data`."""
