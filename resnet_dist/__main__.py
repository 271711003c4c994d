"""`python -m resnet_dist`: the same as the `resnet-dist` command, and what `accelerate launch -m` runs."""

import sys

from resnet_dist.cli import main

sys.exit(main())
