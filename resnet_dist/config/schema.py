"""Every setting, as frozen dataclasses. The string below a field is its help text; `problems()` lists what is wrong.

Settings come from recipe < TOML file < command line or Python keywords, end up in these classes, and each has one
reader in the code. None means automatic: the value is decided later and printed with its reason.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from resnet_dist.config.duration import Duration
from resnet_dist.config.fields import option, out_of_range
from resnet_dist.runtime.wording import counted

ArchitectureName = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]
ARCHITECTURES: tuple[str, ...] = get_args(ArchitectureName)  # torchvision's names, which are timm's too
BEST_METRICS = {"top1": "max", "top5": "max", "macro_f1": "max", "loss": "min"}
DEFAULT_BATCH_SIZE = 32
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, their split and the batches."""

    data: str | None = option(None, "--data", "--train-dir", positional=True)
    """A folder with train/ and val/, a folder of class folders, or a CSV manifest (path,label[,split])."""
    val_dir: str | None = option(None, "--validation-dir")
    """A separate folder of class folders for validation."""
    val_split: float = option(0.2, "--train-val-split")
    """Share of each class to hold out for validation, if DATA is not split already."""
    split_seed: int = 0
    """Seed of that split."""
    group_by: str | None = None
    """Regular expression on the relative path; images with the same match stay on the same side of the split."""
    exclude_list: str | None = None
    """File that lists images to leave out: a CSV with a column path, or one path per line, relative to DATA."""
    check: Literal["headers", "full"] = "headers"
    """What to check before training: the header of every image, or the whole image (it is decoded)."""
    bad_images: Literal["error", "skip"] = "error"
    """What to do with unusable images; skipped ones are listed in bad_images.txt."""
    max_bad_share: float = 0.01
    """Largest share of unusable images that --bad-images skip accepts."""
    batch_size: int | Literal["auto"] = option(DEFAULT_BATCH_SIZE, "-b", "--per-device-train-batch-size")
    """Images per batch and process; auto: the largest number that fits in the memory of the GPU, found by trying."""
    global_batch_size: int | None = None
    """Images per optimizer step, over all processes and accumulated batches; replaces --batch-size."""
    eval_batch_size: int | None = option(None, "--per-device-eval-batch-size", "--val-batch-size")
    """Images per evaluation batch and process (default: --batch-size)."""
    drop_last: bool = False
    """Drop the last global batch of an epoch if it is incomplete; without this, images from the start of the epoch fill
    it up."""
    workers: int | None = option(None, "-j", "--num-workers", "--dataloader-num-workers")
    """Data loading processes per training process (default: from the number of cores)."""
    cache: Literal["none", "ram", "disk", "device", "auto"] = "auto"
    """Where to cache decoded images: ram, disk, or device (GPU memory, if the images have no random changes on the CPU:
    see --augment-on; otherwise ram); auto: ram, if the images fit in half of the free memory. The pixels are the
    same."""
    cache_dir: str | None = None
    """Folder of --cache disk (default: resnet-dist in the user's cache folder)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        if self.data is None:
            yield "DATA is missing: a folder of images with one sub-folder per class, or a CSV manifest"
        if not 0 < self.val_split < 1:
            yield f"--val-split {self.val_split:g}: must be between 0 and 1"
        if self.batch_size != "auto":
            yield from out_of_range(self, 1, math.inf, "batch_size")
        elif self.global_batch_size is not None:
            yield "--batch-size auto and --global-batch-size both set the batch size: give one of them"
        yield from out_of_range(self, 1, math.inf, "global_batch_size", "eval_batch_size")
        yield from out_of_range(self, 0, 1024, "workers")
        yield from out_of_range(self, 0, 1, "max_bad_share")
        if self.cache_dir is not None and self.cache != "disk":
            yield f"--cache-dir needs --cache disk, not {self.cache}"
        if self.group_by is not None:
            try:
                re.compile(self.group_by)
            except re.error as error:
                yield f"--group-by '{self.group_by}' is not a regular expression: {error}"


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How a decoded image becomes the input of the network, in training, evaluation and prediction alike."""

    img_size: int | None = option(None, "--imgsz", "--image-size")
    """Side of the square input in pixels (default: from the weights, 224)."""
    resize: int | None = option(None, "--eval-resize", "--val-resize-size")
    """Length of the short side before the central crop, for --resize-mode crop (default: from the weights)."""
    resize_mode: Literal["crop", "squash", "pad"] | None = None
    """crop: resize the short side, then crop the centre; squash: resize both sides, ignoring the aspect ratio; pad:
    resize the long side, then pad the short one (default: from the weights, crop)."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter of the (antialiased) resize (default: from the weights, bilinear)."""
    mean: tuple[float, ...] | None = None
    """Mean of the three channels, 0..1 (default: from the weights, ImageNet's)."""
    std: tuple[float, ...] | None = None
    """Standard deviation of the three channels, 0..1 (default: from the weights, ImageNet's)."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to the weights, as in the stored settings of a run that started from a file."""
        others = (self.img_size, self.resize_mode, self.interpolation, self.mean, self.std)
        return None not in others and (self.resize is None) is (self.resize_mode != "crop")

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 8, 4096, "img_size", "resize")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != 3:
                yield f"--{name}: three values are needed, one per channel, not {len(values)}"
        yield from out_of_range(self, 0, 1, "mean")
        yield from out_of_range(self, 0, 1, "std", open_low=True)
        if self.resize is not None and self.resize_mode not in (None, "crop"):
            yield f"--resize needs --resize-mode crop, not {self.resize_mode}"
        if self.resize is not None and self.img_size is not None and self.resize < self.img_size:
            yield f"--resize {self.resize} is smaller than --img-size {self.img_size}: the crop would not fit"


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to the training images. They depend on the seed, the epoch and the image only."""

    aug: Literal["none", "basic", "trivial", "randaug", "custom"] = option("basic", "--augment", "--aa")
    """none: as in evaluation; basic: random crop and flip, and the options below; trivial (TrivialAugment) and randaug
    (RandAugment) add their policy; custom: a transform given in Python as train_transform, instead of all of these."""
    crop: Literal["random-resized", "random-pad"] = "random-resized"
    """random-resized: a crop of random area and aspect ratio; random-pad: resize, pad by --crop-padding, crop at
    random."""
    crop_scale: tuple[float, ...] = (0.08, 1.0)
    """Smallest and largest share of the image area for --crop random-resized."""
    scaled_decode: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size, down to twice --img-size, for --crop random-resized: faster,
    but the pixels differ slightly."""
    crop_padding: int = 4
    """Black pixels added on every side for --crop random-pad."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    rotation: float = 0.0
    """Largest random rotation to either side, in degrees."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter, 0..1."""
    erasing: float = option(0.0, "--random-erase", "--reprob")
    """Probability of erasing a random rectangle; it is filled with the mean colour."""
    mixup: float = option(0.0, "--mixup-alpha")
    """MixUp: parameter of Beta(a, a); 0 is off."""
    cutmix: float = option(0.0, "--cutmix-alpha")
    """CutMix: parameter of Beta(a, a); 0 is off. If MixUp is on too, each pair of images takes one of the two."""
    augment_on: Literal["host", "device"] = "host"
    """device: change the images in batches on the GPU, with --cache device. The same crops, flips and colours, but the
    pixels differ slightly: images are kept with a short side of --resize, or 1.5 times --img-size if that is more. If
    they do not fit on one GPU, they are spread over the GPUs of all processes."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 0, 1, "hflip", "erasing", "color_jitter")
        yield from out_of_range(self, 0, 180, "rotation")
        yield from out_of_range(self, 0, 100, "mixup", "cutmix")
        yield from out_of_range(self, 0, 512, "crop_padding")
        scale = self.crop_scale
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            yield "--crop-scale needs two shares of the area, such as 0.08,1.0"
        if self.augment_on == "device" and self.aug in ("trivial", "randaug", "custom"):
            yield f"--augment-on device does not work with --aug {self.aug}, which changes images one by one"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    model: ArchitectureName = option("resnet50", "--arch")
    """The torchvision ResNet, ResNeXt or Wide ResNet to train."""
    weights: str = "DEFAULT"
    """Pretrained weights: DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2, none, a .safetensors or .pth file, a folder of timm or
    hf://REPOSITORY (such as hf://timm/resnet50.a1_in1k), which bring their preprocessing."""
    head: Literal["linear", "mlp", "concat-pool"] = "linear"
    """linear: one layer; mlp: hidden layers with ReLU and dropout; concat-pool: average and max pooling, then hidden
    blocks."""
    head_hidden: tuple[int, ...] = (512,)
    """Widths of the hidden layers of the heads mlp and concat-pool."""
    dropout: float = option(0.0, "--drop")
    """Dropout before the last layer, and in the hidden layers of the heads mlp and concat-pool."""
    stem: Literal["standard", "small"] = "standard"
    """standard: 7x7 convolution with stride 2 and max pooling; small: 3x3 with stride 1, for images of about 32
    pixels."""

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
    """Optimizer. On a GPU, rmsprop makes the program wait for the device once in every step (torch has no fused form);
    so does adagrad before torch 2.15, once per parameter."""
    lr: float | None = option(None, "--learning-rate")
    """Base learning rate, used for the head (default: depends on the optimizer and on what learns)."""
    lr_base_size: int | None = None
    """Multiply the learning rates by the global batch size divided by this number (default: no scaling)."""
    lr_backbone: float | None = None
    """Learning rate of the backbone: everything but the head."""
    lr_decay_per_stage: float | None = option(None, "--layer-decay")
    """Layer-wise decay: factor of the learning rate from each stage to the next one below, from the head to the
    stem."""
    lr_groups: dict[str, float] | None = None
    """Learning rates by stage, such as "stem=1e-5 layer4=1e-4 head=1e-3"; other stages use --lr."""
    momentum: float | None = None
    """Momentum of sgd and rmsprop (default: 0.9 for sgd, 0 for rmsprop)."""
    nesterov: bool = False
    """Nesterov momentum, for sgd."""
    weight_decay: float | None = option(None, "--wd")
    """Weight decay (default: 0.01 for adamw, 1e-4 for sgd, 0 for the others)."""
    decay_norm_and_bias: bool = False
    """Apply the weight decay to BatchNorm and biases too."""
    clip_grad: float | None = option(None, "--clip-grad-norm", "--max-grad-norm")
    """Largest norm of the gradient; a larger one is scaled down to it (default: no clipping)."""
    grad_accum: int = option(1, "--gradient-accumulation-steps", "--accumulate")
    """Gradient accumulation: batches per optimizer step."""

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
            yield f"{' and '.join(given)} both set the learning rate of the backbone: give one of them"
        for stage, lr in (self.lr_groups or {}).items():
            if stage not in STAGES:
                yield f"--lr-groups: there is no stage '{stage}'; the stages are {', '.join(STAGES)}"
            if not lr >= 0:
                yield f"--lr-groups: {stage}={lr:g} must be at least 0"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rates change within each phase, by epochs or optimizer steps."""

    sched: Literal["step", "multistep", "cosine", "onecycle", "plateau", "constant"] = option("step", "--lr-scheduler")
    """Learning rate schedule."""
    lr_step_size: Duration = option(Duration(7), "--step-size", "--decay-epochs")
    """For step: epochs or steps between two reductions (7, or 200steps)."""
    lr_gamma: float = option(0.1, "--gamma", "--decay-rate")
    """For step, multistep and plateau: factor of each reduction."""
    lr_milestones: tuple[Duration, ...] = option((Duration(30), Duration(60), Duration(90)), "--decay-milestones")
    """For multistep: when the rate is reduced."""
    plateau_patience: int = option(2, "--patience-epochs")
    """For plateau: epochs without a lower validation loss before the rate is reduced."""
    warmup: Duration = option(Duration(0), "--warmup-epochs", "--lr-warmup-epochs")
    """Length of the linear warmup at the start of each phase (0.5, or 100steps)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 0, 1, "lr_gamma", open_low=True)
        yield from out_of_range(self, 0, math.inf, "plateau_patience")
        if self.lr_step_size.value <= 0:
            yield f"--lr-step-size {self.lr_step_size}: must be above 0"
        if self.sched == "multistep" and not self.lr_milestones:
            yield "--sched multistep needs --lr-milestones such as 5,8"
        if self.sched == "onecycle" and self.warmup.value > 0:
            yield "--sched onecycle has its own warmup: leave --warmup out"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss."""

    loss: Literal["ce", "focal"] = "ce"
    """ce: cross-entropy; focal: focal loss, which gives hard samples more weight."""
    focal_gamma: float = 2.0
    """Focusing parameter of the focal loss."""
    label_smoothing: float = option(0.0, "--smoothing")
    """Label smoothing of the cross-entropy, 0..1."""
    class_weights: str = "none"
    """none, balanced (by inverse class frequency), or a TOML file with a weight for each class name."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 0, 1, "label_smoothing")
        yield from out_of_range(self, 0, 100, "focal_gamma")
        if self.loss == "focal" and self.label_smoothing:
            yield "--label-smoothing needs --loss ce, not focal"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The length of the run, its seed, and what it writes."""

    epochs: int = option(10, "--num-train-epochs")
    """Number of epochs over all phases; the last phase takes the rest."""
    seed: int = 0
    """Seed of initialisation, data order, augmentation and dropout."""
    best_metric: Literal["top1", "top5", "loss", "macro_f1"] = "top1"
    """Validation metric that selects the best checkpoint."""
    ema: bool = option(False, "--model-ema")
    """Also keep and evaluate an exponential moving average of the weights."""
    ema_decay: float = option(0.999, "--model-ema-decay")
    """Decay of the average per optimizer step; it warms up as min(decay, (1 + step) / (10 + step))."""
    patience: int = option(0, "--early-stopping-patience")
    """Early stopping: end the phase after this many epochs without a better score; 0 is off."""
    tracker: tuple[str, ...] = option((), "--report-to", "--log-with")
    """Experiment trackers that Accelerate supports, such as tensorboard,wandb,mlflow."""
    time_limit: float | None = None
    """Stop after this many minutes; the best checkpoint and the report are written as usual."""
    save_every: Duration = option(Duration(1), "--checkpoint-every", "--save-steps")
    """How often to write a checkpoint to resume from (1epochs, or 200steps)."""
    keep_last: int = option(2, "--save-total-limit", "--checkpoint-hist")
    """Number of these checkpoints to keep; the best checkpoint is kept in addition."""
    log_every: int = option(10, "--log-interval", "--logging-steps", "--print-freq")
    """Optimizer steps between two lines of metrics.jsonl."""
    report: bool = True
    """Draw the plots and write report.html at the end; `resnet-dist report RUN` does it later."""
    output_dir: str | None = option(None, "-o", "--output")
    """The run folder (default: runs/<model>-<recipe>-<time>)."""
    random_stream: int | None = None
    """Random stream of data order and augmentation for this seed (default: 0; with --init-from, the old run's plus
    1)."""
    init_from: str | None = None
    """Start a new run from the best weights of this run folder or checkpoint (.safetensors); replaces --weights."""
    resume: str | None = option(None, "--resume-from-checkpoint")
    """Continue an interrupted run: its folder, or auto (the run in --output-dir, or a new run if there is none). A
    finished run is never replaced."""
    overwrite: bool = option(False, "--overwrite-output-dir")
    """Replace the run in --output-dir; files that this program did not write are kept."""
    dry_run: bool = False
    """Print the plan (what learns, learning rates, steps, batches), then stop."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 1, math.inf, "epochs", "log_every")
        yield from out_of_range(self, 0, math.inf, "patience", "random_stream")
        yield from out_of_range(self, 0, math.inf, "time_limit", open_low=True)
        if self.save_every.value <= 0 or (self.save_every.unit == "epochs" and self.save_every.value % 1):
            yield f"--save-every {self.save_every}: must be whole epochs or steps, at least 1"
        yield from out_of_range(self, 1, math.inf, "keep_last")
        if self.resume == "auto" and self.output_dir is None:
            yield "--resume auto needs --output-dir, the folder of the run"
        if self.resume is not None and self.overwrite:
            yield "--resume and --overwrite contradict each other: give one of them"
        if not 0 <= self.ema_decay < 1:
            yield f"--ema-decay {self.ema_decay:g}: must be at least 0 and below 1"
        if not 0 <= self.seed < 2**63:
            yield f"--seed {self.seed}: must be at least 0 and below 2^63"


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """How the machine is used: precision, threads, memory, compilation."""

    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = option("auto", "--amp-dtype")
    """auto: the launcher's choice; without one bf16 if the hardware has it, fp16 on older GPUs, and no on other
    CPUs."""
    tf32: bool = True
    """Let GPUs use TF32 for float32 matrix products in training; the reported evaluation never does."""
    threads: int | None = None
    """CPU threads per process (default: the cores of this machine divided by its processes)."""
    keep_memory: Literal["auto", "on", "off"] = "auto"
    """On a CPU, reuse the memory of freed tensors: faster where steps are short, with a peak that is up to a fifth
    higher; auto: on CPUs with AVX-512."""
    sync_bn: Literal["auto", "on", "off"] = "auto"
    """Synchronise BatchNorm over all processes (on GPUs only), with a wait for the device in every BatchNorm layer;
    auto: if BatchNorm trains on fewer than 16 images per process."""
    ddp_comm_hook: Literal["none", "bf16"] = "none"
    """bf16: exchange gradients between processes in 16 bits, for slow networks."""
    autotune: bool = False
    """Before training, measure for some seconds which precision and how many loading processes are fastest here."""
    compile: Literal["auto", "on", "graphs", "off"] = option("auto", "--torchcompile")
    """torch.compile the network for training; auto: on GPUs, if enough steps are left to make up for the compile time;
    graphs: also replay it as CUDA graphs, for small batches on one GPU (not yet timed on one)."""
    cache_features: str = "auto"
    """Cache the output of the frozen stages: auto (if no augmentation changes the images), off, or a number of
    augmented views per image."""
    dist_timeout: float = 30.0
    """Minutes that a process waits for another one before it gives up."""
    deterministic: bool = False
    """Use deterministic algorithms (slower on GPUs)."""

    def problems(self) -> Iterator[str]:
        """What is wrong here, one line each."""
        yield from out_of_range(self, 1, math.inf, "threads")
        views = self.cache_features
        if views not in ("auto", "off") and not (views.isdecimal() and int(views) > 0):
            yield f"--cache-features {views}: must be auto, off, or a number of views such as 4"
        yield from out_of_range(self, 0, math.inf, "dist_timeout", open_low=True)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run in which the same parameters learn."""

    epochs: int | None = None
    """Number of epochs; the last phase takes the rest of --epochs."""
    trainable: str = "all"
    """What learns: all, head, stem, layer1..layer4, batchnorm, or patterns of parameter names; -NAME excludes."""
    batch_norm_stats: Literal["update", "frozen"] | None = None
    """BatchNorm statistics of the backbone (default: update in the stages that learn)."""
    lr_scale: float = 1.0
    """Factor of all learning rates in this phase."""
    backbone_lr_scale: float | None = None
    """Learning rate of the backbone divided by that of the head."""

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
            yield "there is no [[phase]]: at least one is needed"
        *earlier, last = self.phase or (Phase(),)
        for number, phase in enumerate(earlier, 1):
            if phase.epochs is None:
                yield f"phase {number}: epochs are missing; only the last phase may leave them out"
        before = sum(phase.epochs for phase in earlier if phase.epochs is not None)
        if earlier and before >= self.run.epochs:
            lowest = f"must be at least {before + 1}, as the phases before the last take {before}"
            yield f"--epochs {self.run.epochs}: {lowest}"
        elif last.epochs is not None and last.epochs != self.run.epochs - before:
            rest = f"--epochs {self.run.epochs} leaves {self.run.epochs - before} for it"
            yield f"phase {len(self.phase)}: {counted(last.epochs, 'epoch')}, but {rest}"
        if self.system.cache_features.isdecimal() and (self.augment.mixup or self.augment.cutmix):
            yield f"--cache-features {self.system.cache_features} does not work with MixUp and CutMix, which mix pixels"
        if self.system.compile == "graphs" and self.optim.grad_accum > 1:
            yield "--compile graphs does not work with --grad-accum, as a replayed graph overwrites the last gradients"
        if self.augment.augment_on == "device":
            if self.data.cache != "device":
                yield f"--augment-on device needs --cache device, not {self.data.cache}"
            if self.system.cache_features.isdecimal() and self.augment.aug != "none":
                yield "--augment-on device does not work with --cache-features N, which needs each view only once"
        if self.run.init_from is not None and self.model.weights != "none":
            yield f"--init-from and --weights {self.model.weights} both set the initial weights: give one of them"
        if self.data.global_batch_size is None and self.data.batch_size != "auto":
            yield from self.problems_of_batch(self.data.batch_size)

    def problems_of_batch(self, batch_size: int) -> Iterator[str]:
        """What is wrong with this batch size per process."""
        if (self.augment.mixup or self.augment.cutmix) and batch_size % 2:
            yield f"--batch-size {batch_size}: must be even, as MixUp and CutMix pair images"

    def phase_epochs(self) -> tuple[int, ...]:
        """The epochs of each phase: the last one takes the rest. The config has no problems."""
        earlier = [phase.epochs for phase in self.phase[:-1] if phase.epochs is not None]
        return (*earlier, self.run.epochs - sum(earlier))
