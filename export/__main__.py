"""`python -m export RUN`: the same as `resnet-dist export RUN`."""

import sys

from resnet_dist.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
