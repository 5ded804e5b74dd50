"""
Adversarially train an image classifier with a smooth activation (SAT, arXiv:2006.14536).

See it move on a laptop, no data needed:
$ python train.py --data shapes
The ResNet-50 / SiLU row of the README on 8 GPUs:
$ torchrun --standalone --nproc_per_node=8 train.py --arch resnet50 --act silu
What a run would cost, without data:
$ python train.py --arch efficientnet_l1 --enhanced --plan
"""
import argparse
import contextlib
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import data
from activations import ACTIVATIONS
from attacks import pgd, pgd_queue, uniform
from evaluate import (Stopped, all_ranks, asked, device_name, duration, listen, open_device, progress,
                      say, show, summed, tally)
from models import (LOSS_SCALE, MODELS, attacker_view, averaged, build, count, in_precision, load_file,
                    precision, save_file, share_statistics)

# --data picks the defaults of all other flags
RECIPES = {
    # SAT Sec. 3.1: 100 epochs, x0.1 at 30, 60 and 90, weight decay 1e-4, PGD-1 with eps 4 and step 4
    "imagenet": dict(arch="resnet50", act="silu", epochs=100, schedule="step", batch_size=1024, wd=1e-4,
                     eps=4, step_size=4, holdout=10000, val_every=1, log_every=50),
    # SAT Sec. 7 names the attack only; the schedule is from Wong et al. 2020 (arXiv:2001.03994), longer
    "cifar10": dict(arch="resnet18", act="silu", epochs=30, schedule="onecycle", batch_size=128, lr=0.2,
                    wd=5e-4, eps=8, step_size=8, holdout=1000, val_every=1, log_every=50),
    "shapes": dict(arch="resnet8", act="silu", epochs=8, schedule="onecycle", batch_size=64, lr=0.1,
                   wd=5e-4, eps=8, step_size=8, holdout=500, val_every=2, log_every=20),
}
# SAT Sec. 5.2; 0.2 at the last block is EfficientNet's rate, dropout is each network's own
ENHANCED = dict(wd=1e-5, epochs=200, stochastic_depth=0.2, autoaugment=True, ema=True, early_stop=True)

NOISE, CLEAN_START = 2, 3  # uniform's counters in training, beside data's AUGMENT
PROGRESS = "epoch", "step", "ended", "best", "best_epoch", "top", "skipped"  # in every checkpoint
# may differ on --resume
FREE = "out", "resume", "workers", "device", "log_every", "save_every", "download", "plan"
# torch 2.15 renames the argument, 2.11 does not know the new name
warnings.filterwarnings("ignore", message=".*broadcast_buffers.*|.*barrier.*")


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    # data and output
    p.add_argument("--data", default="imagenet", choices=RECIPES, help="picks all other defaults")
    p.add_argument("--data-dir", help="default: data/imagenet, or data for cifar10")
    p.add_argument("--download", action="store_true", help="let torchvision fetch CIFAR-10")
    p.add_argument("--limit", type=int, help="training images, of one fixed permutation; default: all")
    p.add_argument("--holdout", type=int, help="training images kept to validate on, at most a tenth")
    p.add_argument("--out", default="out", help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, or start it")
    p.add_argument("--save-every", type=float, default=10, help="minutes between checkpoints")
    # network
    p.add_argument("--arch", choices=MODELS, metavar="ARCH", help=", ".join(MODELS))
    p.add_argument("--act", choices=ACTIVATIONS, metavar="ACT", help=", ".join(ACTIVATIONS))
    p.add_argument("--act-alpha", type=float, help="its sharpness; default: the paper's")
    p.add_argument("--smooth-backward", default="none", help="SAT Table 1: who sees a smooth ReLU",
                   choices=["none", "attacker", "optimizer", "both"])
    p.add_argument("--dropout", type=float, help="rate; default: 0, with --enhanced the network's own")
    p.add_argument("--stochastic-depth", type=float, default=0.0, help="an EfficientNet's last rate")
    p.add_argument("--res", type=int, help="pixels; default: the network's own, cifar10 and shapes 32")
    # optimization
    p.add_argument("--enhanced", action="store_true", help="Sec. 5.2: dropout, " + ", ".join(ENHANCED))
    p.add_argument("--epochs", type=int, help="the schedule scales with them")
    p.add_argument("--batch-size", type=int, help="images of one update, over all processes")
    p.add_argument("--accum", type=int, default=1, help="parts a batch is worked off in, to save memory")
    p.add_argument("--lr", type=float, help="peak; default: imagenet 0.1 for each 256 of the batch")
    p.add_argument("--schedule", choices=["step", "onecycle"], help="x0.1 at 30, 60, 90%%; a line to 0")
    p.add_argument("--warmup-epochs", type=float, help="default: step 5%%, at most 5; onecycle 40%%")
    p.add_argument("--wd", type=float, help="weight decay of convolution and linear weights")
    p.add_argument("--nesterov", **switch, help="momentum (the released code has it)")
    p.add_argument("--label-smoothing", type=float, default=0.0, help="released code: 0.1")
    p.add_argument("--autoaugment", **switch, help="torchvision's AutoAugment")
    p.add_argument("--ema", **switch, help="average the weights; validate and keep the average")
    p.add_argument("--early-stop", **switch, help="end when robustness falls 20 points; keep the best")
    # the attack inside
    p.add_argument("--eps", type=float, help="L-inf radius in 1/255")
    p.add_argument("--step-size", type=float, help="in 1/255")
    p.add_argument("--steps", type=int, default=1, help="of PGD; 0 is normal training")
    p.add_argument("--clean-start", type=float, default=0.0, help="share attacked from the clean image")
    p.add_argument("--attack-bn", default="eval", choices=["eval", "batch"], help="its statistics")
    # how
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "tf32", "bf16", "fp16"],
                   help="auto: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--compile", **switch, help="torch.compile both views")
    p.add_argument("--val-every", type=int, help="epochs between validations")
    p.add_argument("--log-every", type=int, help="steps between log lines")
    p.add_argument("--workers", type=int, help="processes that read images, for each device")
    p.add_argument("--seed", type=int, default=0, help="of everything random")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--plan", action="store_true", help="say what the run would cost, and exit")

    first, _ = p.parse_known_args(argv)
    p.set_defaults(**RECIPES[first.data] | (ENHANCED if first.enhanced else {}))
    args = p.parse_args(argv)
    gpu = args.device.startswith("cuda") or args.device == "auto" and torch.cuda.is_available()
    imagenet, step = args.data == "imagenet", args.schedule == "step"
    derived = dict(
        lr=0.1 * args.batch_size / 256, dropout=MODELS[args.arch].dropout if args.enhanced else 0.0,
        warmup_epochs=min(5, 0.05 * args.epochs) if step else 0.4 * args.epochs,
        res=MODELS[args.arch].res if imagenet else 32)
    vars(args).update({name: value for name, value in derived.items() if vars(args)[name] is None})
    args.dtype = ("bf16" if gpu else "fp32") if args.dtype == "auto" else args.dtype
    return args


def check(args, world):
    """SystemExit for what argparse cannot see: what we got, what we need, what to type."""
    parts = max(1, world * args.accum)
    near = max(1, args.batch_size // parts) * parts
    for bad, sentence in (
        (args.accum < 1 or args.batch_size < 1 or args.batch_size % parts,
         f"--batch-size {args.batch_size} does not split over {world} processes x --accum {args.accum}; "
         f"use {near} or {near + parts}"),
        (min(args.eps, args.steps) < 0, f"--eps {args.eps:g} --steps {args.steps}; use 0 or more"),
        (args.steps > 0 and args.step_size <= 0, f"--step-size {args.step_size:g} is no attack; use "
         f"--step-size {args.eps or 4:g}, or --steps 0 for normal training"),
        *((not 0 <= vars(args)[k] <= 1, f"--{k.replace('_', '-')} {vars(args)[k]:g}: use 0 to 1")
          for k in ("clean_start", "dropout", "stochastic_depth", "label_smoothing")),
        (min(args.epochs, args.val_every, args.log_every) < 1, f"--epochs {args.epochs} --val-every "
         f"{args.val_every} --log-every {args.log_every}; use 1 or more"),
        ((args.limit or 2) < 2, f"--limit {args.limit} is no training set; use 2 or more"),
        (not args.lr > 0, f"--lr {args.lr:g} trains nothing; use more than 0"),
        (min(args.wd, args.warmup_epochs) < 0, "--wd and --warmup-epochs need 0 or more"),
        (args.early_stop and not args.holdout, "--early-stop needs held-out images; use --holdout 1000"),
    ):
        if bad:
            raise SystemExit(sentence)


# The pieces of a step

def lr_at(args, epoch, step, n_steps):
    """This step's learning rate: warm-up, then x0.1 at 30, 60 and 90% (SAT Sec. 3.1), or a line to 0."""
    now = epoch + step / n_steps
    warm = (now + 1 / n_steps) / args.warmup_epochs if args.warmup_epochs else 1.0
    if args.schedule == "step":
        fall = 0.1 ** sum(now >= share * args.epochs for share in (0.3, 0.6, 0.9))
    else:
        fall = (args.epochs - now) / max(args.epochs - args.warmup_epochs, 1 / n_steps)
    return args.lr * min(warm, fall, 1.0)


def parameter_groups(net, wd):
    """Decay for convolution and linear weights; none for BatchNorm, biases and SmoothReLU's alpha."""
    decayed = [m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    others = [p for p in net.parameters() if all(p is not d for d in decayed)]
    return [{"params": decayed, "weight_decay": wd}, {"params": others, "weight_decay": 0.0}]


def attack(args, model, x, y, index, epoch):
    """The training attack (SAT Sec. 3.1) -> x_adv: PGD from a start that belongs to (seed, epoch, i)."""
    if args.steps == 0:
        return x
    eps = args.eps / 255
    noise = (2 * uniform(args.seed, index, (NOISE, epoch), x.shape[1:]) - 1) * eps
    if args.clean_start:
        noise *= uniform(args.seed, index, (CLEAN_START, epoch), (1, 1, 1)) >= args.clean_start
    return pgd(model, x, y, eps, args.step_size / 255, args.steps, noise,
               LOSS_SCALE.get(args.dtype, 1.0), check=False)


def clock(device, timed):
    if timed and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train_step(run, index, x, y, timed):
    """One update from one batch: attack, forward, backward, step -> the attack's share of the time."""
    args, attacking, began = run.args, 0.0, clock(run.device, timed)
    torch.manual_seed(data.key(args.seed, run.epoch, run.step, run.rank))  # dropout, stochastic depth
    parts = list(zip(x.chunk(args.accum), y.chunk(args.accum), index.chunk(args.accum)))
    for part, (x_part, y_part, index_part) in enumerate(parts):
        start = clock(run.device, timed)
        x_adv = attack(args, run.attacker, x_part, y_part, index_part, run.epoch)
        attacking += clock(run.device, timed) - start
        alone = run.world == 1 or part == len(parts) - 1
        with contextlib.nullcontext() if alone else run.trainee.no_sync():
            with precision(args.dtype, run.device):
                logits = run.trainee(x_adv)
            logits = logits.float()
            loss = F.cross_entropy(logits, y_part, label_smoothing=args.label_smoothing)
            run.scaler.scale(loss * len(y_part) / len(y)).backward()
        with torch.no_grad():  # what is logged: unsmoothed loss and error on the attacked batch
            plain = F.cross_entropy(logits, y_part, reduction="sum")
            run.sums += torch.stack([
                plain.nan_to_num(0, 0, 0), (logits.argmax(1) != y_part).sum().float(),
                torch.full_like(plain, len(y_part)), (~plain.isfinite()).float()])
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.skipped += run.scaler.get_scale() < scale  # fp16 only: such a step changed nothing
    run.optimizer.zero_grad(set_to_none=True)
    share_statistics(run.net, run.world)
    if run.ema:
        run.ema.update_parameters(run.net)
    return attacking / (clock(run.device, timed) - began)


def validate(run, net):
    """Clean and PGD-10 accuracy, step eps / 4, on this rank's share of the held-out images -> counts."""
    args, held = run.args, run.held[run.rank::run.world]
    exact = in_precision(attacker_view(net), "fp32", run.device)
    model = exact if args.dtype == "fp32" else in_precision(attacker_view(net), args.dtype, run.device)
    slots = min(250, max(1, args.batch_size // (run.world * args.accum)))
    batches = data.eval_batches(run.images, held, slots, run.workers, run.device)
    began, lines = time.monotonic(), []
    for line in pgd_queue(
            model, batches, slots, args.eps / 255, args.eps / 4 / 255, 10, seed=args.seed,
            exact=None if model is exact else exact, loss_scale=LOSS_SCALE.get(args.dtype, 1.0),
            tick=lambda: progress(began, len(lines), len(held), "validation ")):
        lines.append(line)
    return tally(lines, 10)


# The run's folder

class Log:
    """log.txt and log.jsonl of rank 0. log.txt is locked: two runs cannot write into one folder."""

    def __init__(self, out, active):
        self.active = active
        if active:
            try:
                out.mkdir(parents=True, exist_ok=True)
                self.files = [open(out / name, "a", buffering=1) for name in ("log.txt", "log.jsonl")]
                fcntl.lockf(self.files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)  # dies with us; flock does not
            except BlockingIOError:
                raise SystemExit(f"another run writes into {out}; wait for it, or choose another --out")
            except OSError as error:
                raise SystemExit(f"cannot write into {out} ({error.strerror}); choose another --out")

    def __call__(self, text, **values):
        if self.active:
            say(text)
            self.files[0].write(text + "\n")
            if values:
                self.files[1].write(json.dumps(values) + "\n")


def open_folder(args, rank, world, facts, notes):
    """The run's log, and its last whole checkpoint or None. SystemExit rather than losing a run."""
    out = Path(args.out)
    if rank == 0:
        for name in ("args.json", "last.pt", "model.pt", "log.txt") if not args.resume else ():
            if (out / name).exists():
                raise SystemExit(f"{out} holds a run ({name}); go on with --resume, or in another --out")
    log = Log(out, rank == 0)
    if world > 1:
        dist.barrier()

    state, damaged = None, []
    for path in (out / "last.pt", out / "last.prev.pt"):
        if args.resume and state is None and path.exists():
            try:
                state = load_file(path)
            except SystemExit as reason:
                damaged.append(str(reason))
    if damaged and state is None:
        raise SystemExit(f"{'; '.join(damaged)}: nothing to go on from; start again in another --out")
    for reason in damaged:
        log(f"{reason}: going on from {out / 'last.prev.pt'}")

    mine = {**vars(args), **facts}
    if state is not None:
        theirs = json.loads((out / "args.json").read_text())
        differ = [f"--{name.replace('_', '-')} {theirs.get(name)} (now {value})"
                  for name, value in mine.items() if name not in FREE and theirs.get(name) != value]
        if differ:
            raise SystemExit(f"the run in {out} has {', '.join(differ)}; use its flags or another --out")
        if state["world"] != world:
            log(f"going on with {world} processes instead of {state['world']}: not bit-exact")
    if rank == 0:
        for file, length in zip(log.files, state["log"] if state else [0, 0]):
            file.truncate(length)
            file.seek(0, os.SEEK_END)
        if not state:
            (out / "args.json").write_text(json.dumps({**mine, **notes}, indent=1) + "\n")
    return log, state


# The run

def network(args, num_classes):
    torch.manual_seed(args.seed)
    return build(args.arch, args.act, num_classes, args.act_alpha,
                 args.smooth_backward in ("optimizer", "both"), args.dropout, args.stochastic_depth,
                 small_input=args.data != "imagenet")


def assemble(args, device, rank, world, num_classes, weights=None):
    """Network, both its views, optimizer: in the order that keeps one storage -> namespace."""
    net = network(args, num_classes)
    cuda = device.type == "cuda"
    net.to(device, memory_format=torch.channels_last if cuda else torch.contiguous_format)
    if weights:
        net.load_state_dict(weights)
    view = attacker_view(net, args.smooth_backward in ("attacker", "both"), args.attack_bn == "batch")
    torch._dynamo.config.recompile_limit = 64  # all views and batch shapes share one `forward`
    compiled = partial(torch.compile, dynamic=False) if args.compile else lambda module: module
    trainee = compiled(net.train())
    if world > 1:
        trainee = DistributedDataParallel(trainee, device_ids=[device] if cuda else None,
                                          broadcast_buffers=False, gradient_as_bucket_view=True)
    return SimpleNamespace(
        args=args, device=device, rank=rank, world=world, net=net, view=view, trainee=trainee,
        attacker=in_precision(compiled(view), args.dtype, device),
        ema=averaged(net) if args.ema else None,
        optimizer=torch.optim.SGD(parameter_groups(net, args.wd), args.lr, momentum=0.9,
                                  nesterov=args.nesterov, fused=cuda),
        scaler=torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16"),
        # where we are, the best so far, and the epoch's sums: loss, errors, images, losses not finite
        epoch=0, step=0, ended="", best=-1.0, best_epoch=0, top=0.0, skipped=0,
        sums=torch.zeros(4, dtype=torch.float64, device=device))


def set_up(args):
    """Data, folder, network, and all of it as the last checkpoint left it -> namespace."""
    device, rank, world = open_device(args.device, args.dtype)
    check(args, world)
    if args.download and rank == 0:
        data.load(args.data, args.data_dir, True, args.res, download=True)
    if args.download and world > 1:
        dist.barrier()
    images = data.load(args.data, args.data_dir, True, args.res, device=device)
    members, held = data.hold_out(images.n, args.limit, args.holdout)
    n_steps = len(data.epoch_batches(members, 0, args.seed, args.batch_size, world))
    if n_steps == 0:
        raise SystemExit(f"{len(members)} training images are no batch for {world} processes; give more")
    num_classes, here = len(images.classes), shlex.quote(str(Path(__file__).parent))
    with torch.device("meta"):  # refuses what these refuse, before there is a folder
        attacker_view(network(args, num_classes), args.smooth_backward in ("attacker", "both"))
    facts = dict(classes=images.classes, small_input=args.data != "imagenet", n_images=images.n)
    log, state = open_folder(args, rank, world, facts, dict(
        num_classes=num_classes, processes=world, python=sys.version.split()[0], torch=torch.__version__,
        torchvision=torchvision.__version__,
        commit=subprocess.getoutput(f"git -C {here} describe --always --dirty 2>/dev/null")))

    run = assemble(args, device, rank, world, num_classes, state and state["model"])
    if state:
        run.optimizer.load_state_dict(state["optimizer"])
        for p, kept in run.optimizer.state.items():  # strides differ between a CPU and a GPU
            kept["momentum_buffer"] = torch.empty_like(p).copy_(kept["momentum_buffer"])
        run.scaler.load_state_dict(state["scaler"])
        if run.ema:
            run.ema.load_state_dict(state["ema"])
        vars(run).update({name: state[name] for name in PROGRESS})
        run.sums += torch.tensor(state["sums"], dtype=torch.float64, device=device) * (rank == 0)
    mine, theirs = ({t.data_ptr() for t in (*tree.parameters(), *tree.buffers())}
                    for tree in (run.net, run.view))
    assert theirs <= mine, "the two views must share their storage"
    vars(run).update(
        images=images, members=members, held=held, n_steps=n_steps, log=log, out=Path(args.out),
        saved=time.monotonic(), unreadable=set(),
        workers=data.loader_processes(args.workers, args.data, world),
        votes=dist.new_group(backend="gloo", timeout=timedelta(hours=24)) if world > 1 else None)
    return run


def vote(run):
    """Was any rank asked to stop, does rank 0 find a checkpoint due? One answer for all ranks."""
    due = run.rank == 0 and time.monotonic() - run.saved > 60 * run.args.save_every
    ballot = torch.tensor([bool(asked.signal), due], dtype=torch.int32)
    if run.world > 1:
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=run.votes)
    return ballot.bool().tolist()


def save(run):
    """last.pt: everything to go on exactly, and nothing that is not finite. All ranks call it."""
    total = all_ranks(run.sums)
    refuse_nonfinite(run, total)
    run.sums = total * (run.rank == 0)
    if run.rank == 0:
        save_file(run.out / "last.pt", {
            "model": run.net.state_dict(), "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(), "ema": run.ema and run.ema.state_dict(),
            "sums": total.tolist(), "world": run.world, "log": [file.tell() for file in run.log.files],
            **{name: vars(run)[name] for name in PROGRESS}})
    run.saved = time.monotonic()


def stop(run):
    save(run)
    run.log(f"stopped at epoch {run.epoch + 1}, step {run.step}; go on with --resume")
    raise SystemExit(75)  # torchrun's own code is 1


def refuse_nonfinite(run, total):
    """SystemExit if a loss was not finite (fp16 skips such steps), or a weight is not."""
    finite = torch.stack([t.isfinite().all() for t in run.net.state_dict().values()]).all()
    if not finite or (total[3] > 0 and run.args.dtype != "fp16"):
        lr = run.optimizer.param_groups[0]["lr"]
        good = [str(p) for p in (run.out / "last.pt", run.out / "last.prev.pt") if p.exists()]
        raise SystemExit(f"loss or weights not finite at epoch {run.epoch + 1}, step {run.step} (lr "
                         f"{lr:.3g}); last good checkpoint: {(good + ['none'])[0]}; try a smaller --lr")


def name_unreadable(run):
    """Name in the log, once, each image file that could not be read, whichever rank met it."""
    met = [run.images.broken]
    if run.world > 1:
        met = [None] * run.world
        dist.all_gather_object(met, run.images.broken, group=run.votes)
    for reason in sorted(set(sum(met, [])) - run.unreadable):
        run.unreadable.add(reason)
        run.log(f"cannot read {reason}; its neighbour stands in ({len(run.unreadable)} such files)")
    run.images.broken.clear()


def log_step(run, share, line):
    """One line, over all ranks since `line`, the (sums, time) of the one before -> the new `line`."""
    args, total, now = run.args, all_ranks(run.sums), time.monotonic()
    refuse_nonfinite(run, total)
    name_unreadable(run)
    loss, errors, n = (total - line[0])[:3].tolist()
    speed, lr = n / (now - line[1]), run.optimizer.param_groups[0]["lr"]
    n_done = run.epoch * run.n_steps + run.step
    eta = (now - run.began) / (n_done - run.began_at) * (args.epochs * run.n_steps - n_done)
    run.log(
        f"epoch {run.epoch + 1:3d}/{args.epochs} | step {run.step:5d}/{run.n_steps} | "
        f"loss {loss / n:7.4f} | adv {100 - 100 * errors / n:5.2f}% | lr {lr:.4f} | {speed:5.0f} img/s "
        f"| attack {100 * share:2.0f}% | eta {duration(eta)}", kind="step", epoch=run.epoch + 1,
        step=run.step, loss=loss / n, error=errors / n, lr=lr, speed=speed, attack_share=share)
    return total, now


def end_epoch(run, began):
    """Log the epoch, validate, keep the best weights, look for catastrophic overfitting, save."""
    args, total = run.args, all_ranks(run.sums)
    counted, final = {}, run.epoch + 1 == args.epochs
    if len(run.held) and (final or (run.epoch + 1) % args.val_every == 0):
        with contextlib.suppress(Stopped):
            counted["raw"] = validate(run, run.net)
            counted["kept"] = validate(run, run.ema.module) if run.ema else counted["raw"]
        if vote(run)[0]:
            stop(run)  # at the epoch's last step: --resume validates first
        counted = {name: summed(counts, run.device) for name, counts in counted.items()}

    run.epoch, run.step, run.sums = run.epoch + 1, 0, torch.zeros_like(run.sums)
    loss, error = (total[:2] / total[2]).tolist()
    name = f"epoch {run.epoch:3d}/{args.epochs}"
    skipped = f" | {run.skipped} steps skipped" * bool(run.skipped)
    run.log(f"{name} | train loss {loss:.4f} | train error {100 * error:.2f}% | "
            f"{duration(time.monotonic() - began)}{skipped}",
            kind="epoch", epoch=run.epoch, loss=loss, error=error, skipped=run.skipped)
    kept, better = (run.ema.module if run.ema else run.net).state_dict(), False
    if counted:
        n, n_correct, n_robust = (counted["kept"][key] for key in ("n", "n_correct", "n_robust"))
        raw = counted["raw"]["n_robust"] / n  # an average would show a collapse too late
        clean, robust = n_correct / n, n_robust / n
        better, run.top = robust > run.best, max(run.top, raw)
        if better:
            run.best, run.best_epoch = robust, run.epoch
        run.log(f"{name} | held-out clean {100 * clean:.2f}% | robust {100 * robust:.2f}% (PGD-10, eps "
                f"{args.eps:g}, n {n}) | best {100 * run.best:.2f}% at epoch {run.best_epoch}",
                kind="val", epoch=run.epoch, n=n, clean=clean, robust=robust, raw_robust=raw)
        if args.early_stop and run.top - raw > 0.2:
            run.ended = (f"stopped early: robust accuracy fell from {run.top:.1%} to {raw:.1%}, "
                         f"catastrophic overfitting; model.pt is best.pt, from epoch {run.best_epoch}")
    for name, due in (("best.pt", better), ("model.pt", better or not args.early_stop)):
        if run.rank == 0 and due:
            save_file(run.out / name, kept)
    save(run)


def main():
    args = get_args()
    if args.plan:
        return plan(args)
    run = set_up(args)
    n, size = len(run.members), sum(p.numel() for p in run.net.parameters()) / 1e6
    run.log(f"{args.arch} {args.act}, {size:.2f}M parameters; {args.data}, {n} images, {len(run.held)} "
            f"held out; {run.n_steps} steps of {min(args.batch_size, n)}; {args.dtype} on {run.world} "
            f"{device_name(run.device)}")
    if run.epoch or run.step:
        run.log(f"going on at epoch {run.epoch + 1}, step {run.step}")
    listen()
    run.began, run.began_at = time.monotonic(), run.epoch * run.n_steps + run.step
    stream = data.train_batches(
        run.images, run.members, args.batch_size, args.epochs, args.seed, (run.epoch, run.step),
        run.rank, run.world, run.workers, run.device, args.autoaugment)
    while run.epoch < args.epochs and not run.ended:
        began, line = time.monotonic(), (all_ranks(run.sums), time.monotonic())
        while run.step < run.n_steps:
            for group in run.optimizer.param_groups:
                group["lr"] = lr_at(args, run.epoch, run.step, run.n_steps)
            timed = (run.step + 1) % args.log_every == 0 or run.step + 1 == run.n_steps
            share = train_step(run, *next(stream), timed)
            run.step += 1
            if timed:
                line = log_step(run, share, line)
            else:
                show(f"epoch {run.epoch + 1}/{args.epochs} | step {run.step}/{run.n_steps}")
            asked_to_stop, due = vote(run)
            if asked_to_stop:
                stop(run)
            if due:
                save(run)
        end_epoch(run, began)
    run.log(run.ended or f"finished epoch {run.epoch} after {duration(time.monotonic() - run.began)}")
    run.log(f"measure it on the test set with python evaluate.py --out {args.out}")
    if dist.is_initialized():
        dist.destroy_process_group()


# What would it cost?

def plan(args):
    """Say what a run is made of and how long it takes: one step is timed, the rest is arithmetic."""
    device, _, _ = open_device(args.device, args.dtype)
    check(args, 1)
    n, classes, source = 1281167, 1000, "ImageNet's, since no folder is here"
    try:
        images = data.load(args.data, args.data_dir, True, args.res)
        n, classes, source = images.n, len(images.classes), "counted"
    except SystemExit:
        if args.data != "imagenet":
            raise
    n = len(data.hold_out(n, args.limit, args.holdout)[0])
    n_steps = -(-n // args.batch_size)
    with torch.device("meta"):
        n_parameters, forward, activations = count(network(args, classes), args.res)
    activations *= 0.5 if args.dtype in ("bf16", "fp16") else 1.0
    passes = 2 * args.steps + 3  # an attack step is 2, the update 3

    # Time one step at the largest size that fits 20 seconds and the GPU; first steps allocate, compile
    run, speed = assemble(argparse.Namespace(**vars(args) | {"accum": 1}), device, 0, 1, classes), None
    for share, batch in ((8, 2), (4, 2), (2, 2), (1, 2), (1, 8), (1, 32)):
        res = args.res // share
        cost = passes * forward * batch * (res / args.res) ** 2
        need = 2 * activations * batch / share**2
        fits = device.type == "cpu" or need < torch.cuda.mem_get_info(device)[0]
        if res >= 32 and (speed is None or fits and cost / speed < 20):
            y = torch.zeros(batch, dtype=torch.long, device=device)
            for _ in range(2 if speed is None or args.compile else 1):
                began = clock(device, True)
                train_step(run, y, torch.rand(batch, 3, res, res, device=device), y, False)
                seconds = clock(device, True) - began
            speed, size = cost / seconds, f"{batch} images at {res} px took {seconds:.1f} s"

    step, name, total = passes * forward * args.batch_size, device_name(device), args.epochs * n_steps
    hours, weights = total * step / speed / 3600, n_parameters * 4 * (4 if args.ema else 3)
    for what, text in (
        ("network", f"{args.arch} {args.act} at {args.res} px, {n_parameters / 1e6:.1f}M parameters, "
                    f"{forward / 1e9:.2f} GFLOPs forward an image"),
        ("data", f"{n} images to train on, {classes} classes ({source})"),
        ("step", f"{step / 1e12:.1f} TFLOPs; PGD-{args.steps} and the update are {passes} forwards"),
        ("run", f"{args.epochs} epochs x {n_steps} steps x {args.batch_size} images = "
                f"{total * args.batch_size / 1e6:.1f}M images, {total * step / 1e18:.3g} EFLOPs"),
        ("memory", f"{weights / 2**30:.1f} GiB for weights and optimizer, about "
                   f"{activations / 2**20:.0f} MiB for each image that a device holds"),
        ("timed", f"{size} on {name} in {args.dtype}; scaled by FLOPs: forward counted, backward taken "
                  "as twice that; without loading and validation"),
        ("hours", ", ".join(f"{hours / k:,.1f} on {k}" for k in (1, 8, 64)) + f" x {name}"),
    ):
        say(f"{what:<8} {text}")


if __name__ == "__main__":
    main()
