"""`resnet-dist VERB ...`: find the verb, read its options, run it. An error is one line and an exit code."""

import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from resnet_dist import __version__
from resnet_dist.cli.parser import named_as_typed, parse, read
from resnet_dist.cli.spellings import hint_for_verb
from resnet_dist.errors import ResnetDistError, UsageError, disk_error
from resnet_dist.runtime import environment as launcher
from resnet_dist.runtime import streams
from resnet_dist.runtime.signals import Stopped, end_with_launcher
from resnet_dist.runtime.wording import printable

VERBS = {  # verb: what it does; its module is resnet_dist.cli.<verb> unless MODULES says otherwise
    "train": "fine-tune a ResNet on a folder of images",
    "lr-find": "find a learning rate for a recipe on your data",
    "reproduce": "repeat a run and report what differs",
    "compare": "train several techniques and test which differences are real",
    "eval": "evaluate a run, a checkpoint or an ONNX model, with one line per image",
    "export": "export the best checkpoint to ONNX and verify it against PyTorch",
    "hub": "write the best checkpoint in the format of timm and the Hugging Face Hub",
    "predict": "classify images with an exported model, without torch",
    "serve": "answer HTTP requests with the classes of images, without torch",
    "explain": "show which parts of an image led to a prediction (saliency maps)",
    "report": "draw the plots of a run again, and write its report.html",
    "label-errors": "rank the training images by how likely their label is wrong",
    "check": "find images that are broken, unusual, duplicate or in several splits",
    "split": "split a folder into train, val and test: a manifest, links or copies",
    "summary": "show layers, shapes, parameters and FLOPs of a model",
    "recipes": "list the named techniques, or print one",
    "bench": "measure where training spends its time, and what to change",
    "bench ladder": "measure what each optimisation gains",
    "bench scaling": "measure how training scales with the number of processes",
    "doctor": "show what this machine has, and test training with two processes",
    "demo": "train on handwritten digits, offline, in a minute",
}
MODULES = {"predict": "export.predict"}


def entry(argv: Sequence[str] | None = None) -> NoReturn:
    """The console command: run it, and leave without waiting for loader processes that ignore signals."""
    end_with_launcher()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] != ["predict"]:  # it does this itself
        streams.prepare()
    code = main(arguments)
    if code == 0 and "resnet_dist.runtime.accelerate" in sys.modules:  # the verb may have connected processes
        from resnet_dist.runtime.accelerate import leave_job

        leave_job()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code (see `resnet_dist.errors`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    words = 2 if " ".join(arguments[:2]) in VERBS else 1
    verb = " ".join(arguments[:words])
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_overview())
            code = 0
        elif arguments[0] in ("-V", "--version"):
            print(f"resnet-dist {__version__}")
            code = 0
        else:
            code = run(verb, arguments[words:])
        sys.stdout.flush()
        return code
    except (ResnetDistError, OSError) as raised:
        error = disk_error(raised) if isinstance(raised, OSError) else raised
        if error is None:
            raise
        if debug:
            traceback.print_exc()
        _print_error(verb, error)
        return error.exit_code
    except Stopped as stopped:
        print(f"resnet-dist {verb}: {stopped}{_again(verb, arguments[words:])}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print(f"resnet-dist {verb}: interrupted", file=sys.stderr)
        return 130


def run(verb: str, arguments: Sequence[str]) -> int:
    """Run one verb. Raises ResnetDistError."""
    if verb not in VERBS:
        raise UsageError(f"there is no verb '{verb}'{hint_for_verb(verb, VERBS)}")
    module = importlib.import_module(module_of(verb))
    if verb == "predict":  # it reads its own options, because it also works without this package
        return int(module.main(arguments, "resnet-dist predict"))
    with named_as_typed(module.Config, arguments):
        if verb == "compare":  # each recipe has a config of its own
            return int(module.main(module.read(arguments)))
        return int(module.main(parse(module.Config, arguments, f"resnet-dist {verb}")))


def _again(verb: str, arguments: Sequence[str]) -> str:
    """How to start a training again that was stopped before its first step, as the end of the message.

    A run folder that was named may exist by now; `--resume auto` also starts a run there that has no checkpoint.
    """
    if verb != "train" or launcher.is_distributed():
        return ""
    from resnet_dist.config.schema import TrainConfig

    typed = read(TrainConfig, arguments).given
    more = ["--resume", "auto"] if "output_dir" in typed and not {"resume", "overwrite"} & set(typed) else []
    return f"; start again with `{shlex.join(['resnet-dist', verb, *arguments, *more])}`"


def module_of(verb: str) -> str:
    """The name of the module with a verb's `Config` and `main`."""
    return MODULES.get(verb, f"resnet_dist.cli.{verb.replace('-', '_').replace(' ', '_')}")


def _overview() -> str:
    lines = [f"resnet-dist {__version__}: fine-tune a ResNet on a folder of images and ship it", ""]
    lines += [f"  resnet-dist {verb:<13} {text}" for verb, text in VERBS.items()]
    lines += ["", "resnet-dist VERB --help shows the options of a verb."]
    return "\n".join(lines)


def _print_error(verb: str, error: ResnetDistError) -> None:
    """Print one line per problem. If every process has the error, only the main process prints it."""
    if launcher.rank() > 0 and (error.shared or isinstance(error, UsageError)):
        return
    for line in error.problems if isinstance(error, UsageError) else [str(error)]:
        print(printable(f"resnet-dist {verb}: error: {line}").replace("\n", "\\n"), file=sys.stderr)
