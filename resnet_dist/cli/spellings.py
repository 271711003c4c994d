"""Hints for users of timm, torchvision's references, Hugging Face, ultralytics and fastai: their options and ours.

None of these spellings is accepted: an unknown option is an error, and its line says what to type instead.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from resnet_dist.runtime.wording import nearest

PROCESSES = "processes come from the launcher: accelerate launch --num_processes N -m resnet_dist train ..."
CPU = "GPUs are used if there are any; put ACCELERATE_USE_CPU=true before the command to train on the CPU"
VERTICAL = "there is no vertical flip; from Python, train_transform takes any transform"
WEIGHTS = "pretrained weights are the default; type --weights none for random weights, or --weights FILE"
FOLDER = "type --output-dir FOLDER, the folder of the run"
CLASSES = "leave it out: the classes are the folders (or the labels) of the data"
EVALUATE = "a run is evaluated by `resnet-dist eval RUN`"
FINAL_LR = "leave it out: the schedules cosine and onecycle end near 0"
WARMUP_LR = "leave it out: the warm-up is linear from near 0; type --warmup for its length"

OPTIONS: Mapping[str, str] = {  # what is typed -> the option of the same meaning, or a hint
    # device, processes, precision
    **dict.fromkeys(("--device", "--cpu", "--use-cpu", "--no-cuda", "--accelerator"), CPU),
    **dict.fromkeys(("--gpus", "--ngpus", "--num-gpus", "--devices", "--world-size", "--nproc-per-node"), PROCESSES),
    **dict.fromkeys(("--num-processes", "--multi-gpu", "--dist-url", "--local-rank", "--num-nodes"), PROCESSES),
    "--amp": "type --mixed-precision bf16 or fp16 (auto is the default)",
    "--no-amp": "type --mixed-precision no",
    "--fp16": "type --mixed-precision fp16",
    "--half": "type --mixed-precision fp16",
    "--bf16": "type --mixed-precision bf16",
    "--precision": "type --mixed-precision auto, no, fp16 or bf16",
    **dict.fromkeys(("--channels-last", "--fuser"), "leave it out: channels_last is always used"),
    **dict.fromkeys(("--sync-batchnorm", "--dist-bn", "--sync-batch-norm"), "--sync-bn"),
    **dict.fromkeys(("--use-deterministic-algorithms", "--full-determinism"), "--deterministic"),
    **dict.fromkeys(("--random-seed", "--manual-seed"), "--seed"),
    "--nw": "--workers",
    # data
    **dict.fromkeys(("--data-path", "--data-dir", "--train-data", "--dataset", "--image-dir"), "--data"),
    **dict.fromkeys(("--valid-pct", "--validation-split"), "--val-split"),
    **dict.fromkeys(("--num-classes", "--nc", "--class-map"), CLASSES),
    "--batch": "type --batch-size (images per process) or --global-batch-size (over all processes)",
    "--bs": "--batch-size",
    "--train-batch-size": "--batch-size",
    "--cache-dataset": "type --cache ram, disk or device (auto is the default)",
    # image size and augmentation
    **dict.fromkeys(("--input-size", "--crop-size", "--train-crop-size", "--val-crop-size", "--size"), "--img-size"),
    "--crop-pct": "type --resize PIXELS, the short side before the central crop: --img-size divided by --crop-pct",
    **dict.fromkeys(("--vflip", "--flipud"), VERTICAL),
    "--fliplr": "--hflip",
    "--degrees": "--rotation",
    "--auto-augment": "--aug",
    "--cutout": "--erasing",
    # the model and what learns
    **dict.fromkeys(("--pretrained", "--no-pretrained", "--initial-checkpoint", "--pretrained-path"), WEIGHTS),
    **dict.fromkeys(
        ("--freeze", "--freeze-backbone", "--freeze-body"),
        "type --trainable head, or a recipe such as --recipe feature-extractor",
    ),
    **dict.fromkeys(
        ("--freeze-epochs", "--unfreeze-epoch", "--freeze-until"),
        "type --recipe head-then-all --phase 1.epochs=N, which trains the head alone for N epochs first",
    ),
    **dict.fromkeys(("--checkpoint", "--ckpt"), "type --weights FILE, --init-from RUN or --resume RUN"),
    # optimizer and schedule
    "--optim": "--opt",
    **dict.fromkeys(("--lr0", "--base-lr"), "--lr"),
    **dict.fromkeys(("--lrf", "--min-lr", "--lr-min"), FINAL_LR),
    **dict.fromkeys(("--warmup-lr", "--lr-warmup-method", "--lr-warmup-decay"), WARMUP_LR),
    "--warmup-steps": "type --warmup with its unit, such as --warmup 100steps",
    "--warmup-ratio": "type --warmup in epochs or steps, such as --warmup 0.5",
    **dict.fromkeys(("--lr-scheduler-type", "--scheduler"), "--sched"),
    "--cos-lr": "type --sched cosine",
    **dict.fromkeys(("--norm-weight-decay", "--bias-weight-decay"), "--decay-norm-and-bias"),
    "--max-norm": "--clip-grad",
    "--label-smoothing-factor": "--label-smoothing",
    # the run
    "--num-epochs": "--epochs",
    **dict.fromkeys(
        ("--max-steps", "--max-train-steps", "--iterations"), "the length of a training is in epochs: type --epochs"
    ),
    **dict.fromkeys(("--name", "--project", "--run-name", "--experiment"), FOLDER),
    **dict.fromkeys(("--save-dir", "--save-path", "--output-path", "--out-dir", "--outdir", "--log-dir"), FOLDER),
    "--exist-ok": "type --overwrite to replace the run in --output-dir, or --resume to continue it",
    "--start-epoch": "type --resume: a run continues where it stopped",
    "--resume-from": "--resume",
    "--save-period": "--save-every",
    "--recovery-interval": "type --save-every with its unit, such as --save-every 200steps",
    **dict.fromkeys(("--wandb", "--log-wandb", "--use-wandb"), "type --tracker wandb"),
    "--tensorboard": "type --tracker tensorboard",
    "--plots": "--report",
    **dict.fromkeys(("--test-only", "--evaluate", "--eval-only", "--do-eval", "--do-predict"), EVALUATE),
    "--do-train": "leave it out: `resnet-dist train` trains",
}

VALUES: Mapping[str, Mapping[str, str]] = {  # of an option: how a foreign value begins -> our value
    "aug": {"ra": "randaug", "ta": "trivial", "original": "trivial", "v0": "trivial"},
    "sched": {"cosine": "cosine", "onecycle": "onecycle", "one_cycle": "onecycle", "reduce": "plateau"},
    "mixed_precision": {"float32": "no", "fp32": "no", "float16": "fp16", "bfloat16": "bf16", "true": "auto"},
}

VERBS: Mapping[str, str] = {  # what is typed -> what to type
    **dict.fromkeys(("val", "validate", "evaluate"), "eval RUN"),
    "test": "eval RUN --split test",
    "resume": "train --resume RUN",
    **dict.fromkeys(("fit", "finetune", "fine-tune", "fine_tune"), "train DATA"),
    **dict.fromkeys(("infer", "inference", "classify"), "predict MODEL IMAGES"),
    **dict.fromkeys(("checks", "env", "settings"), "doctor"),
    "benchmark": "bench",
    "tune": "compare DATA",
    **dict.fromkeys(("onnx", "convert"), "export RUN"),
    "info": "summary",
}


def hint_for_option(flag: str, known: Collection[str]) -> str:
    """What to type instead of an unknown option, as the end of the error; "" if no option is similar."""
    text = OPTIONS.get(flag, "")
    if text.startswith("--") and text not in known and text != "--data":
        text = ""
    if text:
        return f": type {text}" if text.startswith("--") else f": {text}"
    near = nearest(flag, known, cutoff=0.75)
    return f"; did you mean '{near}'?" if near else ""


def hint_for_value(name: str, value: str) -> str:
    """What to type instead of the value of another trainer; "" for any other value."""
    ours = VALUES.get(name, {})
    beginning = next((text for text in ours if value.lower().startswith(text)), None)
    return f"type {ours[beginning]}" if beginning else ""


def hint_for_pair(word: str, known: Collection[str]) -> str:
    """What to type instead of `epochs=3`, as the end of the error; "" if the word is no such pair."""
    name, equals, value = word.partition("=")
    flag = "--" + name.replace("_", "-")
    if not equals or not name.isidentifier() or Path(word).exists():
        return ""
    if flag in known:
        return f": type {flag} {value}"
    return hint_for_option(flag, known)


def hint_for_verb(verb: str, known: Collection[str]) -> str:
    """What to type instead of an unknown verb, as the end of the error; "" if no verb is similar."""
    if verb in VERBS:
        return f": type resnet-dist {VERBS[verb]}"
    near = nearest(verb, known)
    return f"; did you mean '{near}'?" if near else ""
