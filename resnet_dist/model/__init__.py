"""The network: torchvision's ResNets, their heads and weights, and what of them learns. Knows nothing of data."""
