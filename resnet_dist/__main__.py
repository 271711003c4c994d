"""`python -m resnet_dist`: the same as the `resnet-dist` command, and what `accelerate launch -m` runs."""

from resnet_dist.cli import entry

entry()
