"""`python -m export RUN`: the same as `resnet-dist export RUN`."""

import sys

from resnet_dist.cli.main import entry

entry(["export", *sys.argv[1:]])
