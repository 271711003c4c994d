"""`python -m resnet_dist`: the same as the `resnet-dist` command, and what `accelerate launch -m` runs."""

import os
import sys

# `-m` puts the working directory first on the path. A file there, such as export.py, must not be taken for a module
# of ours or of a library, unless this package itself is there.
_PLACE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120 - pathlib could be such a file
_FIRST = sys.path[0] or "."
if os.path.exists(_FIRST) and os.path.samefile(_FIRST, ".") and not os.path.samefile(_FIRST, _PLACE):  # noqa: PTH110, PTH121
    del sys.path[0]

from resnet_dist.runtime.signals import end_with_launcher  # noqa: E402

end_with_launcher()  # before what takes long to import: a launcher that is killed meanwhile must not leave this behind

from resnet_dist.cli.main import entry  # noqa: E402

entry()
