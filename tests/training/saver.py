"""A process that saves without end, to be killed while it does; another takes its place on every line of input.

python -m tests.training.saver FOLDER: each line of standard input is the number of the first state to save. Says
`saving PID`, `saved NUMBER` after every state that is on the disk, and `ended` once the process is gone.
"""

import os
import sys
from pathlib import Path

import torch

from resnet_dist.training.state import State, write_state


def save(folder: Path, number: int) -> None:
    """State `number`: 20 MB that hold the number. Two states share a step, as before and after a validation."""
    state = State(steps_done=number // 2, epochs_done=number)
    write_state(folder, {"model/a": torch.full((5_000_000,), float(number))}, {"state": state.to_dict()}, keep=2)


def main(folder: Path) -> None:
    for line in sys.stdin:
        number = int(line)
        child = os.fork()
        if child == 0:
            while True:
                save(folder, number)
                print(f"saved {number}", flush=True)
                number += 1
        print(f"saving {child}", flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a pool of threads does not live on in a fork
    main(Path(sys.argv[1]))
