"""
Adversarially train an image classifier with a smooth activation (SAT, arXiv:2006.14536).

See it move on a laptop, no data needed:
$ python train.py --data shapes
The ResNet-50 / SiLU row of the README on 8 GPUs:
$ torchrun --standalone --nproc_per_node=8 train.py --arch resnet50 --act silu
Go on after a kill, a Ctrl-C or a full disk; the run's own flags are taken from its folder:
$ python train.py --resume --out out

The run's folder (--out) gets
  args.json           all flags, the classes of the data, versions, the commit
  log.txt, log.jsonl  what the screen showed, and the same numbers as one JSON object a line
  model.pt            the weights to use: the average with --ema, the best with --early-stop
  best.pt             the weights that were most robust on the held-out images
  last.pt             everything that --resume needs; last.prev.pt is the one before

A new idea changes one of four functions right above `main`: `make_optimizer`, `lr_at` (the schedule),
`attack`, and `update` (the loss, one step). `sanity.py cost` times that same step.

Keys: SAT is the paper; equations, sections and tables are numbered as there.
"""
import argparse
import contextlib
import copy
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from activations import ACTIVATIONS, SmoothReLU
from attacks import cross_entropy, input_gradient, pgd, predict, random_start
from data import duration, say, show, write_whole
from models import (MEAN, MODELS, STD, attacker_view, build, in_precision, load_file, on_device,
                    precision, read_state_dict, set_numerics)

# The defaults that --data picks
RECIPES = {
    # SAT Sec. 3.1: 100 epochs, x0.1 at 30, 60 and 90, weight decay 1e-4, PGD-1 with eps 4 and step 4;
    # initial weights and weight decay as in the released code
    "imagenet": dict(arch="resnet50", act="silu", epochs=100, schedule="step", batch_size=1024, wd=1e-4,
                     initial="sat", decay="weights", eps=4, step_size=4, holdout=10000, val_every=1,
                     log_every=50),
    # SAT Sec. 7 names network and attack; the schedule is near Wong et al.'s (arXiv:2001.03994). With
    # initial="sat" the first epoch stays near chance, 14% instead of 22% (results/recipes.log)
    "cifar10": dict(arch="resnet18", act="silu", epochs=15, schedule="onecycle", batch_size=128, lr=0.2,
                    wd=5e-4, initial="torch", decay="all", eps=8, step_size=8, holdout=1000, val_every=5,
                    log_every=50),
    "shapes": dict(arch="resnet8", act="silu", epochs=8, schedule="onecycle", batch_size=64, lr=0.1,
                   wd=5e-4, initial="torch", decay="all", eps=8, step_size=8, holdout=500, val_every=2,
                   log_every=20),
}
# SAT Sec. 5.2; stochastic depth as in EfficientNet. --enhanced also means each network's own dropout
ENHANCED = dict(wd=1e-5, epochs=200, stochastic_depth=0.2, autoaugment=True, ema=True, early_stop=True)

RUN_FILES = ("args.json", "log.txt", "log.jsonl", "model.pt", "best.pt", "last.pt", "last.prev.pt")
# What --resume may change, since the result does not depend on it, rounding aside (--init is not read
# again, and the images below --data-dir are compared by their names)
FREE = ("out", "resume", "init", "workers", "device", "compile", "log_every", "save_every", "download",
        "data_dir")
THIS_PROCESS = ("out", "resume", "device", "download")  # never taken from args.json

# Newer versions of torch warn about broadcast_buffers, which the oldest one we support needs, and about
# the layout of 1x1 convolutions' gradients in DDP, which is harmless
warnings.filterwarnings("ignore", message=".*broadcast_buffers.*|.*Grad strides.*")


# Flags

def get_args(argv=None):
    recipes = [f"  {name}: {recipe}" for name, recipe in RECIPES.items()]
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python train.py [flags]; --help lists them",
        epilog="\n".join(["defaults of each --data:", *recipes]))
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    # data and output
    p.add_argument("--data", default="imagenet", choices=RECIPES, help="picks the defaults listed below")
    p.add_argument("--data-dir", help="default: data/imagenet, or data for cifar10")
    p.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10")
    p.add_argument("--limit", type=int, help="training images, of one fixed permutation; default: all")
    p.add_argument("--holdout", type=int, help="training images kept to validate on, at most a tenth")
    p.add_argument("--out", default="out", help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, or start it")
    p.add_argument("--init", help="start from the weights in this file, torchvision's too")
    p.add_argument("--save-every", type=float, default=10, help="minutes between saves")
    # network
    p.add_argument("--arch", choices=MODELS, metavar="ARCH", help=", ".join(MODELS))
    p.add_argument("--act", choices=ACTIVATIONS, metavar="ACT", help=", ".join(ACTIVATIONS))
    p.add_argument("--act-alpha", type=float, help="the curve's parameter; default: the paper's")
    p.add_argument("--smooth-backward", default="none", help="Table 1: who gets a smooth gradient",
                   choices=["none", "attacker", "optimizer", "both"])
    p.add_argument("--initial", choices=["sat", "torch"],
                   help="weights to start from: the released code's, or torch's own for every layer")
    p.add_argument("--dropout", type=float, help="rate; default: 0, with --enhanced the network's own")
    p.add_argument("--stochastic-depth", type=float, default=0.0,
                   help="EfficientNet's: a block's rate is this times the share of blocks before it")
    p.add_argument("--bn-eps", type=float, default=1e-5, help="BatchNorm's; torchvision b5-b7: 1e-3")
    p.add_argument("--mean", type=float, nargs=3, default=list(MEAN), help="of R, G and B, in [0, 1]")
    p.add_argument("--std", type=float, nargs=3, default=list(STD), help="their standard deviation")
    p.add_argument("--res", type=int, help="pixels; default: the network's own, cifar10 and shapes 32")
    # optimization
    p.add_argument("--enhanced", action="store_true",
                   help="Sec. 5.2, for EfficientNets: dropout, " + ", ".join(ENHANCED))
    p.add_argument("--epochs", type=int, help="the schedule scales with them")
    p.add_argument("--batch-size", type=int, help="images of one update, over all processes")
    p.add_argument("--accum", type=int, default=1, help="parts a batch is split into, to save memory")
    p.add_argument("--lr", type=float, help="peak; default: imagenet 0.1 for each 256 of the batch")
    p.add_argument("--schedule", choices=["step", "onecycle"],
                   help="after warm-up x0.1 at 30, 60 and 90%% of the epochs, or a line to 0")
    p.add_argument("--warmup-epochs", type=float, help="default: 5%%, at most 5; onecycle 40%%")
    p.add_argument("--wd", type=float, help="weight decay")
    p.add_argument("--decay", choices=["weights", "all"],
                   help="what --wd decays: convolution and linear weights, or norms and biases too")
    p.add_argument("--nesterov", **switch, help="momentum, as the released code has")
    p.add_argument("--label-smoothing", type=float, default=0.0, help="released code: 0.1")
    p.add_argument("--autoaugment", **switch, help="torchvision's AutoAugment")
    p.add_argument("--ema", **switch, help="average the weights; validate and keep the average")
    p.add_argument("--early-stop", **switch, help="end when robustness drops 20 points; keep the best")
    # the attack inside
    p.add_argument("--eps", type=in_255, help="L-inf radius in 1/255")
    p.add_argument("--step-size", type=in_255, help="in 1/255")
    p.add_argument("--steps", type=int, default=1, help="of PGD; 0 is normal training")
    p.add_argument("--clean-start", type=float, default=0.0, help="fraction attacked from x itself")
    # precision, speed and logging
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "tf32", "bf16", "fp16"],
                   help="auto: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    p.add_argument("--val-every", type=int, help="epochs between validations")
    p.add_argument("--log-every", type=int, help="steps between log lines")
    p.add_argument("--workers", type=int, help="processes that read images, for each device")
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")

    # Parsed twice: --data and --enhanced decide what the other flags are by default, and a run that
    # goes on has its own
    first, _ = p.parse_known_args(argv)
    p.set_defaults(**RECIPES[first.data])
    if first.enhanced:
        p.set_defaults(**ENHANCED)
    args_file = Path(first.out) / "args.json"
    if first.resume and args_file.exists():
        saved = read_json(args_file)
        for name in vars(first):
            if name in saved and name not in THIS_PROCESS:
                p.set_defaults(**{name: saved[name]})
    args = p.parse_args(argv)

    # Defaults that depend on other flags
    if args.res is None:
        args.res = data.DATA_SETS[args.data].res or MODELS[args.arch].res
    if args.lr is None:
        args.lr = 0.1 * args.batch_size / 256
    if args.dropout is None:
        args.dropout = MODELS[args.arch].dropout if args.enhanced else 0.0
    if args.warmup_epochs is None:
        one_cycle = args.schedule == "onecycle"
        args.warmup_epochs = 0.4 * args.epochs if one_cycle else min(5, 0.05 * args.epochs)
    if args.dtype == "auto":
        args.dtype = "bf16" if wants_gpu(args) else "fp32"
    if args.compile is None:
        args.compile = wants_gpu(args)
    return args


def in_255(text):
    """A radius or a step in 1/255, as papers write it: "8" and "8/255" are both 8."""
    number, slash, unit = text.partition("/")
    if slash and unit != "255":
        raise argparse.ArgumentTypeError(f"{text} is not in 1/255; use 8 or 8/255")
    return float(number)


def wants_gpu(args):
    """Whether --device names a GPU, or leaves the choice and there is one."""
    return args.device.startswith("cuda") or (args.device == "auto" and torch.cuda.is_available())


def need(condition, sentence):
    """SystemExit unless the condition holds; the sentence: what we got, what we need, what to type."""
    if not condition:
        raise SystemExit(sentence)


@contextlib.contextmanager
def exit_on_value_error():
    """Turn a library module's ValueError into SystemExit with the same sentence."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(str(error))


def flag(name):
    """The flag that fills args.name."""
    return "--" + name.replace("_", "-")


def check_numbers(args):
    """SystemExit for a flag whose number is not finite or makes no sense; evaluate.py calls it too."""
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name in ("dropout", "stochastic_depth", "label_smoothing", "clean_start"):
            need(0 <= value <= 1, f"{flag(name)} {value} is not a fraction; use 0 to 1")
        elif name in ("eps", "step_size"):
            need(0 <= value <= 255, f"{flag(name)} {value:g} is out of range; use 0 to 255")
        elif name in ("holdout", "save_every", "warmup_epochs", "wd", "steps", "workers", "seed"):
            need(0 <= value < math.inf, f"{flag(name)} {value} is out of range; use 0 or more")
        else:
            need(0 < value < math.inf, f"{flag(name)} {value} is out of range; use more than 0")


def warn_small_eps(args):
    """Warn of a radius or a step that looks like a fraction of [0, 1] instead of a number of 1/255."""
    for name in ("eps", "step_size"):
        value = getattr(args, name)
        if value is not None and 0 < value < 0.25:
            say(f"{flag(name)} {value:g} means {value:g}/255; for {value:g} of the range from 0 to 1 "
                f"use {flag(name)} {255 * value:g}")


def check(args, world):
    """SystemExit for flags that argparse cannot judge alone."""
    check_numbers(args)
    warn_small_eps(args)
    n_parts = world * args.accum
    fewer = max(1, args.batch_size // n_parts) * n_parts
    need(args.out.strip(), "--out is empty; name a folder, such as --out out")
    need(world == 1 or not args.download, "--download is for one process; fetch the data first, with "
         f"python train.py --data {args.data} --download")
    need(args.batch_size % n_parts == 0,
         f"--batch-size {args.batch_size} does not split over {world} processes x --accum {args.accum}; "
         f"use {fewer} or {fewer + n_parts}")
    need(args.steps == 0 or args.step_size > 0,
         f"--step-size {args.step_size:g} is no attack; use --step-size {args.eps or 4:g}, or --steps 0 "
         "for normal training")
    need(args.smooth_backward == "none" or args.act == "relu",
         f"--smooth-backward is for ReLU, {args.act} has its own gradient; use --act relu")
    need(not args.early_stop or args.holdout > 0,
         "--early-stop needs held-out images; use --holdout 1000, or --no-early-stop")
    need(not args.early_stop or args.steps > 0,
         "--early-stop keeps the most robust weights and --steps 0 trains no robustness; add "
         "--no-early-stop")
    need(wants_gpu(args) or not args.compile or args.dtype != "bf16",
         "--compile with --dtype bf16 gave NaN gradients on a CPU; use --dtype fp32 or --no-compile")
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as in torch
    need(not args.compile or shutil.which(compiler),
         f"--compile needs a C++ compiler, and {compiler} is not here; install it, or use --no-compile")


def check_data(args, images, held_out, n_steps, batch_size, world):
    """SystemExit for flags that these images, which allow batches of batch_size, cannot satisfy."""
    need(n_steps > 0 and batch_size // (world * args.accum) >= 2,
         f"a batch of {batch_size} images in {world} processes x --accum {args.accum} has parts of "
         "fewer than two, and BatchNorm needs two; use more images, or a larger --batch-size")
    need(len(held_out) > 0 or not args.early_stop, "--early-stop needs held-out images, and a tenth of "
         f"{min(images.n, args.limit or images.n)} rounds to 0; use more images")


def contradictions(saved, given):
    """Where flags, {name: value, None if not given}, differ from a run's args.json -> clauses."""
    clauses = []
    for name, value in given.items():
        if value is not None and saved.get(name) != value:
            clauses.append(f"{flag(name)} {saved.get(name)} (here {value})")
    return clauses


# The machine

def open_device(name, dtype="fp32", timeout=timedelta(minutes=30)):
    """Where this process runs -> device, and torchrun's rank and world (0 and 1 without torchrun).

    timeout: how long the processes wait for each other.
    """
    set_numerics(dtype)
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    # One process a GPU, which is how torchrun numbers them
    known = ["cpu"] + [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    need(name in known, f"--device {name} is not here; use {', '.join(known)}, or fewer processes")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    return device, rank, world


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def all_ranks(tensor):
    """The sum of a tensor over all processes."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def listen():
    """From here on SIGINT and SIGTERM only set the event returned; a second one ends at once."""
    stop_asked = threading.Event()

    def ask(number, frame):
        if not stop_asked.is_set():
            os.write(2, b"\nstopping at the next check; Ctrl-C again ends at once\n")
        stop_asked.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop_asked


# The run's folder

def read_json(path):
    """A JSON object. SystemExit if it is missing, damaged, or anything else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"no file {path}; is {path.parent} the folder of a run?")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is damaged ({error}); restore it, or use another folder")
    need(isinstance(content, dict), f"{path} holds no JSON object; restore it, or use another folder")
    return content


def write_file(path, write, previous=None):
    """Write a file whole or not at all. SystemExit where the disk is full or read-only."""
    try:
        write_whole(path, write, previous)
    except (OSError, RuntimeError) as error:  # the latter is torch's on a full disk
        why = getattr(error, "strerror", None) or "torch stopped in the middle"
        raise SystemExit(f"cannot write {path} ({why}): is the disk full? What was written before is "
                         "whole; make room, then go on with --resume or the same command")


def write_json(path, content):
    """A JSON object, whole or not at all."""
    def write(file):
        file.write(json.dumps(content, indent=1).encode() + b"\n")

    write_file(path, write)


@dataclass
class Progress:
    """Where a run is: saved and loaded whole."""

    epoch: int = 0  # epochs that are over
    step: int = 0  # steps of the current one that are over
    n_updates: int = 0
    best: float = -1.0  # held-out robust accuracy
    best_epoch: int = 0
    ended: str = ""  # why, if it ended early
    sums: tuple = (0.0, 0.0, 0.0)  # loss, errors and images of this epoch, over all ranks
    world: int = 1


class Run:
    """The folder of a run. Rank 0 locks it and writes; no run overwrites another's files."""

    def __init__(self, args, rank):
        self.out = Path(args.out)
        self.rank = rank
        if rank > 0:
            return
        # Not the empty ones: a start that fails later leaves its logs empty, opened only to lock them
        existing = [name for name in RUN_FILES if (self.out / name).exists()]
        existing = [name for name in existing if (self.out / name).stat().st_size > 0]
        need(not existing or args.resume,
             f"{self.out} holds a run ({', '.join(existing)}); go on with --resume, or in another --out")
        can_go_on = "last.pt" in existing or "last.prev.pt" in existing
        # args.json alone is left by a kill before the first checkpoint (`begin`): it starts again
        need(can_go_on or existing in ([], ["args.json"]),
             f"{self.out} holds a run ({', '.join(existing)}) and no checkpoint to go on from; start "
             "again in another --out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.text = open(self.out / "log.txt", "a", buffering=1, errors="backslashreplace")
            self.json = open(self.out / "log.jsonl", "a", buffering=1)
            # Not flock: the loader's workers would inherit it and outlive this process
            fcntl.lockf(self.text, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run writes into {self.out}; wait for it, or choose another --out")
        except OSError as error:
            raise SystemExit(f"cannot write into {self.out} ({error.strerror}); choose another --out")

    def log(self, text, **values):
        """A line for the screen and log.txt, and its numbers for log.jsonl."""
        if self.rank > 0:
            return
        say(text)
        try:
            self.text.write(text + "\n")
            if values:
                self.json.write(json.dumps(values) + "\n")
        except OSError as error:
            raise SystemExit(f"cannot write the log ({error.strerror}): is the disk full? Make room, "
                             "then go on with --resume")

    def log_step(self, name, progress, n_steps, sums, lr, seconds, waiting, eta):
        """A step's log line: means since the line before, from its batch_sums and seconds."""
        loss_sum, n_errors, n_seen = sums.tolist()
        loss = loss_sum / n_seen
        error = n_errors / n_seen
        speed = n_seen / seconds
        share = waiting / seconds
        self.log(f"{name} | step {progress.step:5d}/{n_steps} | loss {loss:7.4f} | "
                 f"adv {100 * (1 - error):5.2f}% | lr {lr:.4f} | {speed:5.0f} img/s | "
                 f"wait {100 * share:2.0f}% | eta {duration(eta)}",
                 kind="step", epoch=progress.epoch + 1, step=progress.step, loss=loss, error=error,
                 lr=lr, speed=speed, waiting=share)

    def log_epoch(self, name, progress, sums, seconds):
        """The line of an epoch, from its sums over all ranks."""
        loss_sum, n_errors, n_seen = sums.tolist()
        loss = loss_sum / n_seen
        error = n_errors / n_seen
        self.log(f"{name} | train loss {loss:.4f} | train error {100 * error:.2f}% | "
                 f"{duration(seconds)}",
                 kind="epoch", epoch=progress.epoch + 1, loss=loss, error=error)

    def log_validation(self, name, progress, n, clean, robust, eps):
        self.log(f"{name} | held-out clean {100 * clean:.2f}% | robust {100 * robust:.2f}% (PGD-10, eps "
                 f"{eps:g}, n {n}) | best {100 * progress.best:.2f}% at epoch {progress.best_epoch}",
                 kind="val", epoch=progress.epoch + 1, n=n, clean=clean, robust=robust)

    def save(self, name, content, previous=None):
        """Tensors and plain Python, by rank 0."""
        if self.rank == 0:
            if previous is not None:
                previous = self.out / previous
            write_file(self.out / name, partial(torch.save, content), previous)

    def save_checkpoint(self, parts, progress):
        """last.pt: the state of every part, {name: part}, and the counters. The one before is kept."""
        states = {name: part.state_dict() for name, part in parts.items()}
        self.save("last.pt", {**states, **vars(progress)}, previous="last.prev.pt")

    def begin(self, args, facts, parts, world):
        """args.json and a first checkpoint, so that there is always one to go on from -> Progress."""
        progress = Progress(world=world)
        if self.rank == 0:
            folder = shlex.quote(str(Path(__file__).parent))
            commit = subprocess.getoutput(f"git -C {folder} describe --always --dirty 2>/dev/null")
            versions = dict(commit=commit, processes=world, python=sys.version.split()[0],
                            torch=torch.__version__, torchvision=torchvision.__version__)
            write_json(self.out / "args.json", {**vars(args), **facts, **versions})
        self.save_checkpoint(parts, progress)
        return progress

    def checkpoint(self):
        """What last.pt or, where it is damaged or missing, last.prev.pt holds; None without both."""
        damaged = []
        for path in (self.out / "last.pt", self.out / "last.prev.pt"):
            if path.exists():
                try:
                    state = load_file(path)
                    if not isinstance(state, dict) or "optimizer" not in state:
                        raise ValueError(f"{path} is no checkpoint")
                except ValueError as error:
                    damaged.append(str(error))
                    continue
                for sentence in damaged:
                    self.log(f"{sentence}: going on from {path}")
                return state
        need(not damaged, f"{'; '.join(damaged)}: nothing to go on from; start again in another --out")
        return None

    def resume(self, args, facts, parts):
        """Load the last checkpoint into the parts -> Progress; None if there is none to go on from.

        SystemExit if it was made with other flags or data. facts: what args.json holds beside the flags.
        """
        state = self.checkpoint()
        if state is None:
            return None
        saved = read_json(self.out / "args.json")
        clauses = contradictions(saved, {k: v for k, v in vars(args).items() if k not in FREE})
        for name, words in (("n_images", "another number of images"), ("classes", "other classes"),
                            ("names", "other file names or labels")):
            if saved.get(name) != facts[name]:
                clauses.append(f"{words} in its data")
        need(not clauses,
             f"the run in {self.out} has {', '.join(clauses)}; --resume needs only --out. To "
             "train on from its weights, use another --out and --init "
             f"{shlex.quote(str(self.out / 'model.pt'))}")
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, KeyError):
            raise SystemExit(f"the checkpoint in {self.out} is not of the network in args.json; use "
                             "another --out")
        for group in parts["optimizer"].param_groups:
            if "fused" in group:  # as this device wants it, not as the saved one did
                group["fused"] = parts["optimizer"].defaults["fused"]
        for p, moments in parts["optimizer"].state.items():
            for name, value in moments.items():
                # Into p's layout: the saved one differs between a CPU and a GPU, and fused SGD is
                # silently wrong where the two differ. Not for a step count: a scalar p has its shape
                if torch.is_tensor(value) and value.ndim > 0 and value.shape == p.shape:
                    moments[name] = torch.empty_like(p).copy_(value)
        progress = Progress(**{name: state[name] for name in vars(Progress())})
        if progress.epoch < args.epochs and not progress.ended:
            self.log(f"going on at epoch {progress.epoch + 1}, step {progress.step}", kind="resume",
                     epoch=progress.epoch + 1, step=progress.step)
        return progress


def init_from(net, path):
    """Take every tensor of --init's file that fits by name and shape -> a sentence for the log.

    It names what stays at its initialisation, such as a classifier for other classes.
    """
    wanted = net.state_dict()
    with exit_on_value_error():
        found, _ = read_state_dict(path, wanted)
    # mean and std are in no state dict: read_state_dict adds them where a foreign file has them, and a
    # run has them in its args.json
    args_file = Path(path).parent / "args.json"
    saved = read_json(args_file) if args_file.exists() else {}
    for name, own in (("mean", net.mean.cpu()), ("std", net.std.cpu())):
        value = found.pop(name, None)
        if value is None:
            value = torch.tensor(saved.get(name, own.flatten().tolist())).view(3, 1, 1)
        numbers = " ".join(f"{number:g}" for number in value.flatten().tolist())
        need(torch.allclose(value, own), f"--init {path} was trained with another normalisation; add "
             f"{flag(name)} {numbers}")
    taken = {}
    for name, tensor in found.items():
        if name in wanted and wanted[name].shape == tensor.shape:
            taken[name] = tensor
    n_weights = sum(tensor.ndim > 0 for tensor in taken.values())  # BatchNorm's counters fit any network
    need(n_weights > 0, f"--init {path}: no tensor fits this network by name and shape; use the file's "
         "own --arch")
    net.load_state_dict(taken, strict=False)
    missing = [name for name in wanted if name not in taken]
    sentence = f"--init {path}: {len(taken)} of {len(wanted)} tensors taken"
    if missing:
        shown = ", ".join(missing[:6]) + (", ..." if len(missing) > 6 else "")
        sentence += f"; {len(missing)} stay at their initialisation: {shown}"
    if len(found) > len(taken):
        sentence += f"; {len(found) - len(taken)} of the file are unused"
    return sentence


def agree(run, progress, world):
    """Check that all processes resume at the same place -> a gloo group for any_rank; None if alone.

    A change in the number of processes is logged. SystemExit if the places differ.
    """
    if progress.world != world:
        run.log(f"going on with {world} processes instead of {progress.world}: not bit-exact")
        progress.world = world
    if world == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))  # nccl takes no CPU tensors
    places = [None] * world
    dist.all_gather_object(places, (progress.epoch, progress.step), group=group)
    need(len(set(places)) == 1, f"the processes see different checkpoints in {run.out}, (epoch, step) "
         f"{places}; --out needs to be one folder for all nodes")
    return group


def any_rank(group, *flags):
    """For each flag, a bool, whether it is set on any rank -> [bool]."""
    votes = torch.tensor(flags, dtype=torch.int32)
    if group is not None:
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=group)
    return votes.bool().tolist()


# The network, and the models that are made of it

def network(args, num_classes):
    """The network that the flags describe, as the optimizer sees it."""
    return build(
        args.arch, args.act, num_classes, act_alpha=args.act_alpha,
        smooth_backward=args.smooth_backward in ("optimizer", "both"), dropout=args.dropout,
        stochastic_depth=args.stochastic_depth, small_input=data.DATA_SETS[args.data].small_input,
        bn_eps=args.bn_eps, initial=args.initial, mean=args.mean, std=args.std)


def attack_view(net, args):
    """The network as the attacker sees it: net's storage, frozen, in eval mode (Table 1's split)."""
    return attacker_view(net, smooth_backward=args.smooth_backward in ("attacker", "both"))


def make_views(net, args, device, world=1, kept=None):
    """Three models over the storage of net and `kept`, neither of which may move from here on.

    attack_model  the attacker's view: its backward pass computes no weight gradient, even compiled, so
                  an attack step costs as much as 2 forward passes, not 3; outside DDP
    train_model   net itself, in DDP where there are several processes
    val_model     a frozen view of `kept` (net, or with --ema its average), with ReLU's own gradient
    """
    attack_model = attack_view(net, args)
    train_model = net.train()
    if args.compile:
        # CUDA graphs pay off where launches bound a step: one process, small images. Not with --accum:
        # a replay would overwrite the gradients that the part before has left in .grad
        graphs = device.type == "cuda" and world == 1 and args.accum == 1 and args.res <= 64
        attack_model = compiled(attack_model, graphs)
        train_model = compiled(train_model, graphs)
    if world > 1:  # average_batchnorm_statistics sees to the buffers
        device_ids = [device] if device.type == "cuda" else None
        train_model = DistributedDataParallel(train_model, device_ids=device_ids,
                                              broadcast_buffers=False, gradient_as_bucket_view=True)
    # Not train_model: `update` needs DDP itself, and sets the precision around it
    attack_model = in_precision(attack_model, args.dtype, device)
    val_model = in_precision(attacker_view(kept or net), args.dtype, device)
    return attack_model, train_model, val_model


def compiled(net, graphs):
    """net, compiled; with CUDA graphs an output is valid only until the next call."""
    if not graphs:
        return torch.compile(net, dynamic=False)
    replay = torch.compile(net, dynamic=False, mode="reduce-overhead")

    def model(x):
        torch.compiler.cudagraph_mark_step_begin()  # from here the last call's output may be overwritten
        return replay(x)
    return model


def check_compiled(args, net, attack_model, x, y):
    """SystemExit if the compiled attack and the eager one disagree about the gradient of a batch.

    Compilers have been silently wrong (torch 2.11: SmoothReLU's gradient was 0; bf16 on a CPU: NaN). The
    check leaves the run unchanged: the view updates no statistics and draws no random numbers.
    """
    if args.steps == 0:
        return

    def gradient(model, x, y):
        _, grad = input_gradient(model, x, partial(cross_entropy, y=y))
        return grad.flatten(1)

    x = x.tensor_split(args.accum)[0]
    y = y.tensor_split(args.accum)[0]
    # A CUDA graph warms up, then records; the third call is the first to replay it. The first two get
    # other images, so that a replay that ignores its input is caught
    for _ in range(2):
        gradient(attack_model, x.flip(0), y.flip(0))
    grad = gradient(attack_model, x, y)[:8]
    eager_model = in_precision(attack_view(net, args), args.dtype, x.device)
    eager = gradient(eager_model, x[:8], y[:8])
    cosine = F.cosine_similarity(grad, eager)
    is_right = (cosine > 0.9) | (grad == eager).all(1)  # both may be 0
    need(is_right.all(), f"the compiled network's gradient is wrong (its cosine with the eager one is "
         f"{cosine.min():.2f}, torch {torch.__version__}); go on with --resume --no-compile")


# The pieces of a step

def parameter_groups(net, wd, decay):
    """Decay for convolution and linear weights, or for all; never for SmoothReLU's alpha.

    The released code adds wd / 2 |w|^2 to the loss, which is what torch's weight_decay does.
    """
    decayed = []
    others = []
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            is_weight = isinstance(module, (nn.Conv2d, nn.Linear)) and name == "weight"
            if is_weight or (decay == "all" and not isinstance(module, SmoothReLU)):
                decayed.append(p)
            else:
                others.append(p)
    return [{"params": decayed, "weight_decay": wd}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def batch_sums(logits, y):
    """What is logged of a batch -> (3,) float64: sum of cross-entropy, number of errors and of images.

    The loss here has no label smoothing. Everything stays on the device: a step does not wait for it.
    """
    loss_sum = F.cross_entropy(logits, y, reduction="none").double().sum()
    n_errors = (logits.argmax(1) != y).sum().double()
    n_images = torch.full_like(loss_sum, len(y))
    return torch.stack([loss_sum, n_errors, n_images])


@torch.no_grad()
def average_batchnorm_statistics(net, world):
    """One all-reduce after each step gives all ranks the same BatchNorm statistics: their mean.

    Differs from SAT: its code keeps one process's statistics.
    """
    if world == 1:
        return
    statistics = [b for name, b in net.named_buffers() if name.endswith(("running_mean", "running_var"))]
    if statistics:
        flat = torch.cat(statistics)
        dist.all_reduce(flat)
        means = (flat / world).split([len(b) for b in statistics])
        torch._foreach_copy_(statistics, list(means))


@torch.no_grad()
def update_ema(ema, net, n_updates):
    """ema, a copy of net, moves towards it, buffers too; decay min(0.9999, (1 + n) / (10 + n))."""
    decay = min(0.9999, (1 + n_updates) / (10 + n_updates))
    for average, value in zip(ema.state_dict().values(), net.state_dict().values()):
        if average.is_floating_point():
            average.lerp_(value, 1 - decay)
        else:
            average.copy_(value)


def finite_sums(sums, net, progress, lr, out):
    """This epoch's batch_sums over all ranks -> (3,). SystemExit if a loss or a weight is not finite.

    Called only at log lines and saves: no other step waits for the device.
    """
    total = all_ranks(sums)
    weights_finite = torch.stack([t.isfinite().all() for t in net.state_dict().values()]).all()
    need(total.isfinite().all() and weights_finite,
         f"loss or weights are not finite at epoch {progress.epoch + 1}, step {progress.step} (lr "
         f"{lr:.3g}); last good checkpoint: {out / 'last.pt'}; try a smaller --lr")
    return total


def validate(args, model, images, held_out, workers, device, rank, world):
    """PGD-10 (step eps / 4, last iterate) on the held-out images -> n, n_correct, n_robust of all ranks.

    Each image has its own fixed start, the same in every epoch.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    own = held_out[rank::world]
    batch_size = min(250, max(1, args.batch_size // (world * args.accum)))
    eps = args.eps / 255
    for index, x, y in data.eval_batches(images, own, batch_size, workers=workers, device=device):
        show(f"validation {int(counts[0])}/{len(own)}")
        noise = random_start(x, eps, args.seed, index)
        x_adv = pgd(model, x, y, eps=eps, step_size=eps / 4, steps=10, noise=noise)
        with torch.no_grad():
            correct = predict(model(x)) == y
            robust = correct & (predict(model(x_adv)) == y)
        counts += torch.stack([torch.ones_like(y).sum(), correct.sum(), robust.sum()])
    return all_ranks(counts).tolist()


# What a new idea changes: the optimizer, its learning rate, the attack, and one step

def make_optimizer(args, net, device):
    """SGD with momentum (SAT Sec. 3.1) -> optimizer, and the scaler that float16 needs."""
    optimizer = torch.optim.SGD(parameter_groups(net, args.wd, args.decay), args.lr, momentum=0.9,
                                nesterov=args.nesterov, fused=device.type == "cuda")
    # Made here: if float16 skips the first step, fused SGD would read uninitialised memory
    for p in net.parameters():
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    return optimizer, scaler


def lr_at(args, epoch, step, n_steps):
    """This step's learning rate: warm-up, then x0.1 at 30, 60, 90% (SAT Sec. 3.1) or linearly to 0."""
    now = epoch + step / n_steps
    warmup = 1.0
    if args.warmup_epochs > 0:
        warmup = min(1.0, (now + 1 / n_steps) / args.warmup_epochs)
    if args.schedule == "step":
        n_drops = sum(now >= share * args.epochs for share in (0.3, 0.6, 0.9))
        decay = 0.1**n_drops
    elif args.schedule == "onecycle":
        # A line through 1 at the end of the warm-up; before that it is above 1 and min() takes `warmup`.
        # max(): a warm-up as long as the run would divide by 0
        decay = (args.epochs - now) / max(args.epochs - args.warmup_epochs, 1 / n_steps)
    return args.lr * min(warmup, decay)


def attack(args, model, x, y):
    """The training attack (SAT Sec. 3.1) -> x_adv. Its random start comes from torch's generator."""
    if args.steps == 0:
        return x
    eps = args.eps / 255
    noise = torch.empty_like(x).uniform_(-eps, eps)
    if args.clean_start > 0:
        is_random = torch.rand(len(x), 1, 1, 1, device=x.device) >= args.clean_start
        noise = noise * is_random
    return pgd(model, x, y, eps=eps, step_size=args.step_size / 255, steps=args.steps, noise=noise,
               check=False)


def update(args, attack_model, train_model, optimizer, scaler, x, y):
    """One step on this rank's images: attack, forward, loss, backward, optimizer -> its batch_sums.

    x: (N, 3, H, W) in [0, 1], y: (N,) int64. With --accum they go through in parts.
    """
    sums = 0
    x_parts = x.tensor_split(args.accum)
    y_parts = y.tensor_split(args.accum)
    for number, (x_part, y_part) in enumerate(zip(x_parts, y_parts)):
        x_adv = attack(args, attack_model, x_part, y_part)  # (n, 3, H, W)
        if isinstance(train_model, DistributedDataParallel):  # summed over the ranks once
            train_model.require_backward_grad_sync = number + 1 == args.accum
        with precision(args.dtype, x.device):
            logits = train_model(x_adv)  # (n, K)
        logits = logits.float()
        loss = F.cross_entropy(logits, y_part, label_smoothing=args.label_smoothing)
        scaler.scale(loss * len(x_part) / len(x)).backward()
        sums = sums + batch_sums(logits, y_part)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums


def main():
    args = get_args()
    device, rank, world = open_device(args.device, args.dtype)
    check(args, world)

    # Data
    show(f"loading {args.data}")
    images = data.load(args.data, args.data_dir, train=True, res=args.res, device=device,
                       download=args.download)
    members, held_out = data.hold_out(images.n, args.limit, args.holdout)
    # Fewer images than --batch-size make one smaller batch: its real size is read off epoch 0's
    n_steps, batch_size = data.epoch_batches(members, 0, args.seed, args.batch_size, world).shape
    check_data(args, images, held_out, n_steps, batch_size, world)
    workers = data.loader_workers(args.workers, images, world)

    # The network (its first weights depend on the seed alone) and the models made of it
    torch.manual_seed(args.seed)
    with exit_on_value_error():
        net = on_device(network(args, len(images.classes)), device)
    kept_net = net  # what is validated and kept: the network, or the average of its weights
    if args.ema:
        kept_net = copy.deepcopy(net).eval().requires_grad_(False)
    attack_model, train_model, val_model = make_views(net, args, device, world, kept_net)
    optimizer, scaler = make_optimizer(args, net, device)

    # The run: as its last checkpoint left it, or new
    run = Run(args, rank)
    parts = dict(model=net, optimizer=optimizer, scaler=scaler)
    if args.ema:
        parts["ema"] = kept_net
    # small_input is for evaluate.py; --resume compares the others
    facts = dict(classes=images.classes, n_images=images.n, names=images.names_hash(),
                 small_input=data.DATA_SETS[args.data].small_input)
    progress = run.resume(args, facts, parts) if args.resume else None
    if progress is None:
        taken = init_from(net, args.init) if args.init else ""
        if args.ema:
            kept_net.load_state_dict(net.state_dict())
        progress = run.begin(args, facts, parts, world)
        if taken:  # not before: Run refuses a folder that has a log and no checkpoint
            run.log(taken)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    run.log(f"{args.arch} {args.act}, {size:.2f}M parameters; {args.data}, {len(members)} images, "
            f"{len(held_out)} held out; {n_steps} steps of {batch_size}; "
            f"{args.dtype} on {world} {device_name(device)}")
    cpu_group = agree(run, progress, world)

    # The loop
    torch.backends.cudnn.benchmark = True
    stop_asked = listen()
    began = time.monotonic()
    last_save = began
    n_before = progress.n_updates  # by earlier processes
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of this epoch (batch_sums)
    if rank == 0:  # saved as the sum over all ranks, so only one rank may add it
        sums += torch.tensor(progress.sums, dtype=torch.float64, device=device)
    batches = data.train_batches(
        images, members, args.batch_size, args.epochs, seed=args.seed,
        start=(progress.epoch, progress.step), rank=rank, world=world, workers=workers, device=device,
        autoaugment=args.autoaugment)

    while progress.epoch < args.epochs and not progress.ended:
        name = f"epoch {progress.epoch + 1:3d}/{args.epochs}"
        epoch_began = time.monotonic()
        line_began = epoch_began
        line_sums = all_ranks(sums)
        waiting = 0.0
        while progress.step < n_steps:
            wait_began = time.monotonic()
            _, x, y = next(batches)  # x: (N, 3, H, W) in [0, 1], y: (N,) int64
            waiting += time.monotonic() - wait_began
            if args.compile and progress.n_updates == n_before:
                check_compiled(args, net, attack_model, x, y)

            # One step. The attack's start, dropout and stochastic depth draw from torch's generator,
            # seeded anew each step: nothing random needs saving, on a CPU a resumed run is bit-exact
            torch.manual_seed(data.key(args.seed, progress.epoch, progress.step, rank))
            lr = lr_at(args, progress.epoch, progress.step, n_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr  # one rate for all groups, whatever make_optimizer gave them
            sums += update(args, attack_model, train_model, optimizer, scaler, x, y)
            average_batchnorm_statistics(net, world)
            progress.step += 1
            progress.n_updates += 1
            if args.ema:
                update_ema(kept_net, net, progress.n_updates)

            # A log line: means over all ranks since the line before. Reading them waits for the device
            if progress.step % args.log_every == 0 or progress.step == n_steps:
                total = finite_sums(sums, net, progress, lr, run.out)
                now = time.monotonic()
                n_ahead = (args.epochs - progress.epoch) * n_steps - progress.step
                eta = n_ahead * (now - began) / (progress.n_updates - n_before)
                run.log_step(name, progress, n_steps, sums=total - line_sums, lr=lr,
                             seconds=now - line_began, waiting=waiting, eta=eta)
                line_sums = total
                line_began = now
                waiting = 0.0
            else:
                show(f"{name} | step {progress.step}/{n_steps}")

            # All ranks stop or save together, if any was asked to stop or rank 0 finds a checkpoint due.
            # Not at every step: between many GPUs even a small reduce takes time
            if world == 1 or progress.step % 10 == 0 or progress.step == n_steps:
                save = rank == 0 and time.monotonic() - last_save > 60 * args.save_every
                stop, save = any_rank(cpu_group, stop_asked.is_set(), save)
                if stop or save:
                    progress.sums = finite_sums(sums, net, progress, lr, run.out).tolist()
                    run.save_checkpoint(parts, progress)
                    last_save = time.monotonic()
                if stop:
                    run.log(f"stopped at epoch {progress.epoch + 1}, step {progress.step}; go on with "
                            "the same command and --resume")
                    raise SystemExit(75)  # EX_TEMPFAIL in sysexits.h

        # The epoch is over. The held-out images decide which weights are the best, and whether
        # robustness has collapsed
        run.log_epoch(name, progress, all_ranks(sums), time.monotonic() - epoch_began)
        is_last = progress.epoch + 1 == args.epochs
        is_due = is_last or (progress.epoch + 1) % args.val_every == 0
        is_best = False
        if is_due and len(held_out):
            n, n_correct, n_robust = validate(args, val_model, images, held_out, workers, device,
                                              rank, world)
            robust = n_robust / n
            if args.early_stop and progress.best - robust > 0.2:
                progress.ended = (f"stopped early: robust accuracy dropped from {progress.best:.1%} to "
                                  f"{robust:.1%}, catastrophic overfitting; model.pt is best.pt, from "
                                  f"epoch {progress.best_epoch}")
            is_best = robust > progress.best
            if is_best:
                progress.best = robust
                progress.best_epoch = progress.epoch + 1
                run.save("best.pt", kept_net.state_dict())
            run.log_validation(name, progress, n, n_correct / n, robust, args.eps)
        if is_due and (is_best or not args.early_stop):
            run.save("model.pt", kept_net.state_dict())
        progress.epoch += 1
        progress.step = 0
        sums.zero_()
        if is_last or progress.ended:  # progress.sums is stale here; no epoch follows that reads it
            run.save_checkpoint(parts, progress)

    took = duration(time.monotonic() - began)
    run.log(progress.ended or f"finished epoch {progress.epoch} after {took} of this process")
    run.log(f"measure it on the test set with python evaluate.py --out {shlex.quote(args.out)}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped before this process took a step")
    except RuntimeError as error:  # torch raises it wherever the process is when a worker dies
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(f"{error}; is there enough memory? Use fewer --workers")
