"""Every setting, as frozen dataclasses. The string under a field is its help text; `problems()` lists what is wrong.

A setting's way is one way: recipe < TOML file < command line -> these classes -> one reader in the code. A value of
None means automatic: it is decided later, from what is known then, and printed with its reason.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from resnet_dist.config.duration import Duration
from resnet_dist.config.fields import option, out_of_range

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BEST_METRICS = {"top1": "max", "top5": "max", "macro_f1": "max", "loss": "min"}
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to learn from: images, split and batches."""

    data: str | None = option(None, "--data", "--train-dir", positional=True)
    """A folder with train/ and val/, or one folder of class folders, or a CSV manifest (path,label[,split])."""
    val_dir: str | None = option(None, "--validation-dir")
    """A separate folder of class folders for validation."""
    val_split: float = option(0.2, "--train-val-split")
    """Share of every class held out for validation where DATA is not split already."""
    split_seed: int = 0
    """Seed of that split."""
    group_by: str | None = None
    """Regular expression on the relative path; images whose matches are equal stay on one side of the split."""
    exclude_list: str | None = None
    """Images to leave out: a CSV with a column path, or one path per line, relative to DATA as in predictions.csv."""
    check: Literal["headers", "full"] = "headers"
    """Before training, look at the header of every image, or decode them all."""
    bad_images: Literal["error", "skip"] = "error"
    """What to do with images that this finds unusable; skipped ones are listed in bad_images.txt."""
    max_bad_share: float = 0.01
    """More than this share of unusable images is an error even with --bad-images skip."""
    batch_size: int = option(32, "-b", "--per-device-train-batch-size")
    """Images in a batch, per process."""
    global_batch_size: int | None = None
    """Images in an optimizer step, over processes and accumulated batches; replaces --batch-size; a resume keeps it."""
    eval_batch_size: int | None = option(None, "--per-device-eval-batch-size", "--val-batch-size")
    """Images in an evaluation batch, per process (default: --batch-size)."""
    drop_last: bool = False
    """Leave the last, incomplete global batch of an epoch out; otherwise it is filled up from the epoch's start."""
    workers: int | None = option(None, "-j", "--num-workers", "--dataloader-num-workers")
    """Loader processes per training process (default: from cores and processes)."""
    cache: Literal["none", "ram", "disk", "device", "auto"] = "auto"
    """Keep decoded images (the same pixels): ram; disk; device (a GPU keeps those without random changes; else as ram);
    auto (ram where they fit in half of what is free)."""
    cache_dir: str | None = None
    """Folder of --cache disk (default: resnet-dist in the user's cache folder)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.data is None:
            yield "DATA is missing: a folder of images with one sub-folder per class, or a CSV manifest"
        if not 0 < self.val_split < 1:
            yield f"--val-split {self.val_split:g}: must be between 0 and 1"
        yield from out_of_range(self, 1, math.inf, "batch_size", "global_batch_size", "eval_batch_size")
        yield from out_of_range(self, 0, 1024, "workers")
        yield from out_of_range(self, 0, 1, "max_bad_share")
        if self.cache_dir is not None and self.cache != "disk":
            yield f"--cache-dir applies to --cache disk only, not to {self.cache}"
        if self.group_by is not None:
            try:
                re.compile(self.group_by)
            except re.error as error:
                yield f"--group-by '{self.group_by}' is not a regular expression: {error}"


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """From a decoded image to the network's input, in training, evaluation and prediction alike."""

    img_size: int | None = option(None, "--imgsz", "--image-size")
    """Side of the square input in pixels (default: what the weights were trained for, 224)."""
    resize: int | None = option(None, "--eval-resize", "--val-resize-size")
    """Short side before the central crop, for --resize-mode crop (default: from the weights)."""
    resize_mode: Literal["crop", "squash", "pad"] | None = None
    """crop: resize the short side and cut the centre; squash: ignore the aspect ratio; pad: fit the long side
    (default: from the weights, crop)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter of the (antialiased) resize (default: from the weights, bilinear)."""
    mean: tuple[float, ...] | None = None
    """Mean of the three channels, 0..1 (default: from the weights, ImageNet's)."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the three channels, 0..1 (default: from the weights, ImageNet's)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 8, 4096, "img_size", "resize")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != 3:
                yield f"--{name} has {len(values)} values: three are needed, one per channel"
        yield from out_of_range(self, 0, 1, "mean")
        yield from out_of_range(self, 0, 1, "std", open_low=True)
        if self.resize is not None and self.resize_mode not in (None, "crop"):
            yield f"--resize applies to --resize-mode crop only, not to {self.resize_mode}"
        if self.resize is not None and self.img_size is not None and self.resize < self.img_size:
            yield f"--resize {self.resize} is below --img-size {self.img_size}: the crop would not fit"


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to the training images; a pure function of seed, epoch and image."""

    aug: Literal["none", "basic", "trivial", "randaug"] = option("basic", "--augment", "--aa")
    """none: the evaluation geometry; basic: crop, flip and what is set below; trivial, randaug: that policy too."""
    crop: Literal["random-resized", "random-pad"] = "random-resized"
    """random-resized: a random area and aspect ratio; random-pad: resize, pad by --crop-padding, cut at random."""
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    """Smallest and largest share of the area for random-resized."""
    scaled_decode: bool = False
    """For random-resized, decode large JPEGs at 1/2, 1/4 or 1/8, down to twice --img-size (faster; other pixels)."""
    crop_padding: int = 4
    """Pixels of black added on every side for random-pad."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Largest rotation to either side, in degrees."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter, 0..1."""
    erasing: float = option(0.0, "--random-erase", "--reprob")
    """Probability of erasing a random rectangle (filled with the mean colour)."""
    mixup: float = option(0.0, "--mixup-alpha")
    """MixUp: parameter of Beta(a, a); 0 is off."""
    cutmix: float = option(0.0, "--cutmix-alpha")
    """CutMix: parameter of Beta(a, a); 0 is off. With MixUp also on, each pair takes one of the two."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 0, 1, "hflip", "erasing", "color_jitter")
        yield from out_of_range(self, 0, 180, "rotation")
        yield from out_of_range(self, 0, 100, "mixup", "cutmix")
        yield from out_of_range(self, 0, 512, "crop_padding")
        scale = self.crop_scale
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            yield "--crop-scale needs two shares of the area such as 0.08,1.0"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    model: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = option("resnet50", "--arch")
    """Which torchvision ResNet."""
    weights: str = "DEFAULT"
    """Pretrained weights: DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2, none, or a .safetensors or .pth file."""
    head: Literal["linear", "mlp", "concat-pool"] = "linear"
    """linear; mlp (hidden layers with ReLU and dropout); concat-pool (average and max pooling, the deeper head)."""
    head_hidden: tuple[int, ...] = (512,)
    """Widths of the hidden layers of the heads mlp and concat-pool."""
    dropout: float = option(0.0, "--drop")
    """Dropout before the last layer (and in the hidden blocks of the deeper heads)."""
    stem: Literal["standard", "small"] = "standard"
    """standard: 7x7 stride 2 and max pooling; small: 3x3 stride 1, for images of about 32 pixels."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if not 0 <= self.dropout < 1:
            yield f"--dropout {self.dropout:g}: must be at least 0 and below 1"
        yield from out_of_range(self, 1, 65536, "head_hidden")
        if not self.head_hidden and self.head != "linear":
            yield f"--head-hidden is empty: --head {self.head} needs at least one width, or take --head linear"
        if self.stem == "small" and self.weights in ("DEFAULT", "IMAGENET1K_V1", "IMAGENET1K_V2"):
            yield f"--stem small has no pretrained weights {self.weights}: add --weights none"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and the learning rate of every parameter group."""

    opt: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = option("sgd", "--optimizer")
    """Optimizer."""
    lr: float | None = option(None, "--learning-rate")
    """Base learning rate, that of the head (default: by optimizer and by what learns)."""
    lr_base_size: int | None = None
    """Scale the learning rates linearly, by the global batch over this number (default: not at all)."""
    lr_backbone: float | None = None
    """Learning rate of everything but the head."""
    lr_decay_per_stage: float | None = option(None, "--layer-decay")
    """Factor from one stage to the next, from the head down to the stem."""
    lr_groups: dict[str, float] | None = None
    """Learning rates by stage, such as "stem=1e-5 layer4=1e-4 head=1e-3"; a stage left out has --lr."""
    momentum: float | None = None
    """Momentum of sgd and rmsprop (default: 0.9 for sgd, 0 for rmsprop)."""
    nesterov: bool = False
    """Nesterov momentum, for sgd."""
    weight_decay: float | None = option(None, "--wd")
    """Weight decay (default: 0.01 for adamw, 1e-4 for sgd, 0 for the others)."""
    decay_norm_and_bias: bool = False
    """Apply the weight decay to BatchNorm and biases too."""
    clip_grad: float | None = option(None, "--clip-grad-norm", "--max-grad-norm")
    """Clip the norm of the gradient to this."""
    grad_accum: int = option(1, "--gradient-accumulation-steps", "--accumulate")
    """Batches whose gradients are added up before an optimizer step."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 0, math.inf, "lr", "lr_backbone", "weight_decay")
        yield from out_of_range(self, 0, math.inf, "clip_grad", open_low=True)
        yield from out_of_range(self, 0, 1, "lr_decay_per_stage", open_low=True)
        yield from out_of_range(self, 1, math.inf, "grad_accum", "lr_base_size")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            yield f"--momentum {self.momentum:g}: must be at least 0 and below 1"
        if self.nesterov and (self.opt != "sgd" or self.momentum == 0):
            yield "--nesterov needs --opt sgd with a --momentum above 0"
        ways = {"lr_backbone", "lr_decay_per_stage", "lr_groups"}
        given = sorted(f"--{w.replace('_', '-')}" for w in ways if getattr(self, w) is not None)
        if len(given) > 1:
            yield f"{' and '.join(given)} say the same thing in different ways: give one of them"
        for stage, lr in (self.lr_groups or {}).items():
            if stage not in STAGES:
                yield f"--lr-groups: no stage '{stage}'; there are {', '.join(STAGES)}"
            if not lr >= 0:
                yield f"--lr-groups: {stage}={lr:g} must be at least 0"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rates change; counted in epochs or optimizer steps, within each phase."""

    sched: Literal["step", "multistep", "cosine", "onecycle", "plateau", "constant"] = option("step", "--lr-scheduler")
    """Schedule."""
    lr_step_size: Duration = option(Duration(7), "--step-size", "--decay-epochs")
    """step: length of a stair (7, or 200steps)."""
    lr_gamma: float = option(0.1, "--gamma", "--decay-rate")
    """step, multistep, plateau: factor at each stair."""
    lr_milestones: tuple[Duration, ...] = option((Duration(30), Duration(60), Duration(90)), "--decay-milestones")
    """multistep: when the stairs come."""
    plateau_patience: int = option(2, "--patience-epochs")
    """plateau: epochs without a lower validation loss before the rate falls."""
    warmup: Duration = option(Duration(0), "--warmup-epochs", "--lr-warmup-epochs")
    """Linear warm-up at the start of each phase, before the schedule (0.5, or 100steps)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 0, 1, "lr_gamma", open_low=True)
        yield from out_of_range(self, 0, math.inf, "plateau_patience")
        if self.lr_step_size.value <= 0:
            yield f"--lr-step-size {self.lr_step_size}: must be above 0"
        if self.sched == "multistep" and not self.lr_milestones:
            yield "--sched multistep needs --lr-milestones such as 5,8"
        if self.sched == "onecycle" and self.warmup.value > 0:
            yield "--sched onecycle warms up by itself: leave --warmup out"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss."""

    loss: Literal["ce", "focal"] = "ce"
    """ce: cross-entropy; focal: focal loss, which turns from easy samples to hard ones."""
    focal_gamma: float = 2.0
    """Focusing parameter of the focal loss."""
    label_smoothing: float = option(0.0, "--smoothing")
    """Label smoothing of the cross-entropy, 0..1."""
    class_weights: str = "none"
    """none; balanced (inverse class frequency); or a TOML file with a weight for every class name."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 0, 1, "label_smoothing")
        yield from out_of_range(self, 0, 100, "focal_gamma")
        if self.loss == "focal" and self.label_smoothing:
            yield "--label-smoothing belongs to --loss ce, not to focal"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The length of the run, its seed and what it keeps."""

    epochs: int = option(10, "--num-train-epochs")
    """Epochs in all; the last phase takes what the phases before it leave."""
    seed: int = 0
    """Seed of initialisation, order, augmentation and dropout."""
    best_metric: Literal["top1", "top5", "loss", "macro_f1"] = "top1"
    """What decides which checkpoint is the best."""
    ema: bool = option(False, "--model-ema")
    """Keep an exponential moving average of the weights and evaluate it too."""
    ema_decay: float = option(0.999, "--model-ema-decay")
    """Decay of that average per optimizer step, warmed up as min(decay, (1 + step) / (10 + step))."""
    patience: int = option(0, "--early-stopping-patience")
    """End the phase after so many epochs without a better score; 0 is off."""
    tracker: tuple[str, ...] = option((), "--report-to", "--log-with")
    """Send metrics to trackers that Accelerate knows, such as tensorboard,wandb,mlflow."""
    time_limit: float | None = None
    """Stop after so many minutes, with everything written."""
    save_every: Duration = option(Duration(1), "--checkpoint-every", "--save-steps")
    """How often a checkpoint to resume from is written (1epochs, or 200steps)."""
    keep_last: int = option(2, "--save-total-limit", "--checkpoint-hist")
    """How many of those checkpoints are kept; the best one is apart from them."""
    log_every: int = option(10, "--log-interval", "--logging-steps", "--print-freq")
    """Optimizer steps between two lines of metrics.jsonl."""
    report: bool = True
    """Draw the plots and write report.html when training ends; `resnet-dist report RUN` does so later."""
    output_dir: str | None = option(None, "-o", "--output")
    """The run folder (default: runs/<model>-<recipe>-<time>)."""
    random_stream: int | None = None
    """Which of the seed's random streams orders and augments (default: 0; with --init-from one after the old run's)."""
    init_from: str | None = None
    """A new run from the best weights of an old one: its folder, or a checkpoint (.safetensors); replaces --weights."""
    resume: str | None = option(None, "--resume-from-checkpoint")
    """Go on with an interrupted run: its folder, or auto (the run that --output-dir holds, or a new one). A
    finished run is never replaced."""
    overwrite: bool = option(False, "--overwrite-output-dir")
    """Replace the run that --output-dir holds; files that the program did not write stay."""
    dry_run: bool = False
    """Print the plan (what learns, learning rates, steps, batches) and stop."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 1, math.inf, "epochs", "log_every")
        yield from out_of_range(self, 0, math.inf, "patience", "random_stream")
        yield from out_of_range(self, 0, math.inf, "time_limit", open_low=True)
        if self.save_every.value <= 0 or (self.save_every.unit == "epochs" and self.save_every.value % 1):
            yield f"--save-every {self.save_every}: must be whole epochs or steps, at least 1"
        yield from out_of_range(self, 1, math.inf, "keep_last")
        if self.resume == "auto" and self.output_dir is None:
            yield "--resume auto needs --output-dir, to know which run"
        if self.resume is not None and self.overwrite:
            yield "--resume and --overwrite contradict each other"
        if not 0 <= self.ema_decay < 1:
            yield f"--ema-decay {self.ema_decay:g}: must be at least 0 and below 1"
        if not 0 <= self.seed < 2**63:
            yield f"--seed {self.seed}: must be at least 0 and below 2^63"


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """How the machine is used; nothing here is meant to change what is learnt."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = option("auto", "--amp-dtype")
    """auto: what the launcher says, else bf16 where the hardware has it, fp16 on older GPUs, no on other CPUs."""
    tf32: bool = True
    """Let GPUs use TF32 in float32 products while training (written-down evaluations never do)."""
    threads: int | None = None
    """CPU threads per process (default: cores divided by the processes of this machine)."""
    keep_memory: bool = True
    """On a CPU, keep the memory that tensors free for the next ones: faster, up to a fifth more of it at the peak."""
    sync_bn: Literal["auto", "on", "off"] = "auto"
    """BatchNorm over the batches of all processes; auto: on GPUs when it trains on under 16 images per process."""
    ddp_comm_hook: Literal["none", "bf16"] = "none"
    """bf16: send gradients between processes in 16 bits (for slow networks)."""
    autotune: bool = False
    """Before training, try for some seconds which precision and how many loader processes are fastest here."""
    compile: Literal["auto", "on", "off"] = option("auto", "--torchcompile")
    """Compile the network for training; auto: on GPUs, once enough steps are left to win the time back."""
    cache_features: str = "auto"
    """auto: keep what frozen stages make of images that never change; off; or a number of random views to keep."""
    dist_timeout: float = 30.0
    """Minutes after which a process that waits for another gives up."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (slower on GPUs)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 1, math.inf, "threads")
        views = self.cache_features
        if views not in ("auto", "off") and not (views.isdecimal() and int(views) > 0):
            yield f"--cache-features {views}: must be auto, off, or a number of views such as 4"
        yield from out_of_range(self, 0, math.inf, "dist_timeout", open_low=True)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training in which the same parameters learn."""

    epochs: int | None = None
    """Length; the last phase takes the rest of --epochs."""
    trainable: str = "all"
    """What learns: all, head, stem, layer1..layer4, batchnorm, or patterns of parameter names; -NAME takes away."""
    batch_norm_stats: Literal["update", "frozen"] | None = None
    """BatchNorm statistics of the backbone (default: they update in the stages that learn)."""
    lr_scale: float = 1.0
    """Factor on every learning rate of this phase."""
    backbone_lr_scale: float | None = None
    """Learning rate of everything but the head, as a share of the head's."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 1, math.inf, "epochs")
        yield from out_of_range(self, 0, math.inf, "lr_scale", "backbone_lr_scale")
        if not self.trainable.split():
            yield "--trainable is empty: name at least one stage, such as head"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tune a ResNet on a folder of images."""

    recipe: str | None = None
    data: DataConfig = DataConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    run: RunConfig = RunConfig()
    system: SystemConfig = SystemConfig()
    phase: tuple[Phase, ...] = (Phase(),)

    def problems(self) -> Iterator[str]:
        """Everything that is wrong, one line each."""
        for section in dataclasses.fields(TrainConfig):  # not those that a verb adds
            if section.name not in ("recipe", "phase"):
                yield from getattr(self, section.name).problems()
        for number, phase in enumerate(self.phase, 1):
            for problem in phase.problems():
                yield problem if len(self.phase) == 1 else f"phase {number}: {problem}"
        yield from self._across_sections()

    def _across_sections(self) -> Iterator[str]:
        if not self.phase:
            yield "no [[phase]]: at least one is needed"
        *earlier, last = self.phase or (Phase(),)
        for number, phase in enumerate(earlier, 1):
            if phase.epochs is None:
                yield f"phase {number}: only the last phase may leave its epochs out"
        before = sum(phase.epochs or 0 for phase in earlier)
        if earlier and before >= self.run.epochs:
            yield f"--epochs {self.run.epochs}: the phases before the last take {before}, so at least {before + 1}"
        elif last.epochs not in (None, self.run.epochs - before):
            rest = self.run.epochs - before
            yield f"phase {len(self.phase)}: {last.epochs} epochs, but --epochs {self.run.epochs} leaves it {rest}"
        if self.system.cache_features.isdecimal() and (self.augment.mixup or self.augment.cutmix):
            yield f"--cache-features {self.system.cache_features}: MixUp and CutMix mix pixels, not features"
        if self.run.init_from is not None and self.model.weights != "none":
            yield f"--init-from and --weights {self.model.weights} both say where to start: give one of them"
        if self.data.global_batch_size is None:
            yield from self.problems_of_batch(self.data.batch_size)

    def problems_of_batch(self, batch_size: int) -> Iterator[str]:
        """What is wrong with that many images per process."""
        if (self.augment.mixup or self.augment.cutmix) and batch_size % 2:
            yield f"--batch-size {batch_size}: MixUp and CutMix pair images, so it must be even"

    def with_phase_epochs(self) -> "TrainConfig":
        """The same with the length of every phase written out."""
        *earlier, last = self.phase
        rest = self.run.epochs - sum(phase.epochs or 0 for phase in earlier)
        return dataclasses.replace(self, phase=(*earlier, dataclasses.replace(last, epochs=rest)))
