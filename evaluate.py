"""
Measure clean and robust accuracy, exactly.

After `python train.py ...`, with no other flag:
$ python evaluate.py --steps 200 --eps 4
The number to quote, and the protocol of SAT (arXiv:2006.14536) on 8 GPUs with any state dict:
$ python evaluate.py --attack autoattack
$ torchrun --nproc_per_node=8 evaluate.py --last-iterate --weights FILE --arch resnet50 --act silu

An image counts as robust only if no iterate of any restart fools the model. Its starts depend on (seed,
index, restart) alone, its verdict, rounding aside, on no batch size, order or number of processes.
"""
import argparse
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import data
from attacks import STANDARD, autoattack, doubts, pgd_queue
from models import LOSS_SCALE, MODELS, attacker_view, build, in_precision, load_weights

PGD = {"imagenet": (4, 1, 200), "cifar10": (8, 2, 50), "shapes": (8, 2, 50)}  # eps, step size, steps
ATTACKS = {"pgd": (), "apgd": STANDARD[:2], "autoattack": STANDARD}

PAPER = {  # (arch, act, res): clean and robust in percent, PGD-200 at eps 4; None where only drawn
    ("resnet50", "relu", 224): (68.8, 33.0), ("resnet50", "psoftplus", 224): (None, 38.7),
    ("resnet50", "smoothrelu", 224): (69.4, 40.3), ("resnet50", "elu", 224): (None, 41.1),
    ("resnet50", "silu", 224): (69.7, 42.3), ("resnet101", "silu", 224): (72.9, 45.5),
    ("resnet152", "silu", 224): (73.9, 46.0), ("resnext50_32x4d", "silu", 224): (71.2, 42.5),
    ("resnext50_32x8d", "silu", 224): (73.6, 45.1), ("resnet50", "silu", 299): (70.9, 43.8),
    ("resnet50", "silu", 380): (71.6, 44.1), ("resnext152_32x8d", "silu", 380): (78.2, 51.2),
    ("resnet152", "relu", 224): (None, 39.4), ("resnext50_32x8d", "relu", 224): (None, 36.7),
    ("resnet50", "relu", 380): (None, 36.9), ("resnext152_32x8d", "relu", 380): (None, 46.3),
    ("efficientnet_b0", "silu", 224): (65.1, 37.6), ("efficientnet_b7", "silu", 600): (79.8, 57.0),
    ("efficientnet_l1", "silu", 600): (80.5, 58.0),
}


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    # what to measure
    p.add_argument("--out", default="out", help="a run's folder: its model.pt, network and data")
    p.add_argument("--weights", help="a state dict; args.json beside it or the next flags tell the rest")
    p.add_argument("--data", choices=data.SOURCES, help="default: the run's, or imagenet")
    p.add_argument("--data-dir", help="default: the run's, or data/imagenet, or data")
    p.add_argument("--arch", help="default: the run's; " + ", ".join(MODELS))
    p.add_argument("--act", help="default: the run's")
    p.add_argument("--act-alpha", type=float, help="its sharpness; default: the run's")
    p.add_argument("--bn-eps", type=float, help="default: the run's; torchvision's b5 to b7: 1e-3")
    p.add_argument("--res", type=int, help="pixels; default: the run's, or the network's own")
    p.add_argument("--limit", type=int, help="images: the first of one fixed permutation; default: all")
    # the attack
    p.add_argument("--attack", default="pgd", choices=ATTACKS, help="apgd: AutoAttack's first two")
    p.add_argument("--steps", type=int, help="of PGD; default: imagenet 200, else 50")
    p.add_argument("--eps", type=float, help="L-inf radius in 1/255; default: imagenet 4, else 8")
    p.add_argument("--step-size", type=float, help="of PGD, in 1/255; default: imagenet 1, else 2")
    p.add_argument("--restarts", type=int, default=1, help="random starts of PGD to survive")
    p.add_argument("--last-iterate", action="store_true", help="SAT's protocol")
    p.add_argument("--smooth-backward", default="none", choices=["none", "attacker"], help="Sec. 3.2")
    p.add_argument("--seed", type=int, default=0, help="of the random starts")
    # how
    p.add_argument("--dtype", default="fp32", choices=["fp32", "tf32", "bf16", "fp16"],
                   help="of the search; fp32 confirms every image that falls")
    p.add_argument("--batch-size", type=int, help="images in work at a time, on each device")
    p.add_argument("--workers", type=int, help="processes that read images, for each device")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--json", help="write the report to this file too")
    p.add_argument("--fresh", action="store_true", help="start over instead of going on from the ledger")
    return p.parse_args(argv)


# The machine

def open_device(name, dtype="fp32"):
    """Where this process runs -> device, torchrun's rank and world (0 and 1 without it)."""
    torch.set_flush_denormal(True)  # the tail of a smooth curve underflows, and there a CPU crawls
    # Backward passes run outside of `precision`, and torch's default would let cuDNN's round
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    name = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(name, name)
    known = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, **os.environ}
    rank, world, local = (int(known[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    name = f"cuda:{local}" if name == "cuda" else name
    if name not in ("cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))):
        raise SystemExit(f"--device {name} is not here; use cpu, or auto, or fewer processes")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():  # ranks may finish an evaluation hours apart
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=24))
    return device, rank, world


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


# Long work shows where it is, and can be stopped anywhere

class Stopped(Exception):
    """Raised inside long work after SIGINT or SIGTERM."""


asked = SimpleNamespace(signal=None)


def listen():
    """From here on SIGINT and SIGTERM only ask, and long work polls; a second Ctrl-C ends at once."""
    def ask(number, _):
        asked.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)


def stop_if_asked():
    if asked.signal:
        raise Stopped


def show(text):
    """A line that the next one overwrites; nothing where no person looks."""
    if sys.stdout.isatty() and int(os.environ.get("RANK", 0)) == 0:
        print(f"\r\033[K{text}", end="", flush=True)


def say(text):
    """A line that stays."""
    show("")
    print(text, flush=True)


def duration(seconds):
    """3h12m, or below an hour 4m05s."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


# Counts

def tally(lines, steps):
    """Ledger lines -> dict of counts: n, n_correct, n_robust, robust_after each step, forwards."""
    correct = [line for line in lines if line["clean"] == line["label"]]
    if lines and "verdicts" in lines[0]:
        after = [sum(line["verdicts"][k] == "1" for line in lines) for k in range(steps + 1)]
        n_robust = after[-1]
    else:
        fell = [line["fell"] for line in correct]
        n_robust = fell.count(None)
        at = [f[1] for f in fell if f and f[0] == 0]  # in the first restart
        after = [len(fell) - sum(step <= k for step in at) for k in range(steps + 1)]
    return {"n": len(lines), "n_correct": len(correct), "n_robust": n_robust, "robust_after": after,
            "forwards": sum(line["forwards"] for line in lines)}


def all_ranks(tensor):
    """Its sum over all processes."""
    total = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def summed(counts, device):
    """Counts of one process, ints or lists of ints by name -> counts of all processes."""
    return {name: all_ranks(torch.tensor(k, device=device)).tolist() for name, k in counts.items()}


def wilson(k, n, z=1.959964):
    """95% interval of a fraction of which k of n were seen (Wilson 1927)."""
    if n == 0:
        return [0.0, 1.0]
    p, z2 = k / n, z * z / n
    middle, half = p + z2 / 2, z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    return [max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))]


# The ledger: a JSON line an image, one file a process

class Ledger:
    """What was decided before, by any number of processes, and the file of this one to go on in."""

    def __init__(self, folder, name, rank, fresh):
        folder.mkdir(parents=True, exist_ok=True)
        self.report = folder / f"{name}.json"
        if fresh and rank == 0:
            for path in (self.report, *folder.glob(f"{name}.*.jsonl")):
                path.unlink(missing_ok=True)
        if dist.is_initialized():
            dist.barrier()
        self.file = open(folder / f"{name}.{rank}.jsonl", "a+", buffering=1)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another evaluate.py writes {self.file.name}; wait for it, or stop it")
        self.file.seek(0)
        whole = self.file.read().rpartition("\n")[0]
        self.file.truncate(len(whole) + bool(whole))  # a line torn by a kill is dropped
        # A lock falls when any handle of its file is closed, so ours is not opened a second time
        others = set(folder.glob(f"{name}.*.jsonl")) - {Path(self.file.name)}
        self.lines = {}
        for text in (whole + "\n", *(path.read_text() for path in others)):
            for line in map(json.loads, filter(None, text.split("\n")[:-1])):
                self.lines[line["index"], line.get("attack")] = line

    def write(self, line):
        self.lines[line["index"], line.get("attack")] = line
        self.file.write(json.dumps(line) + "\n")


# What is measured, with what, on what

def find_run(args):
    """Network and data: flags first, then the args.json beside the weights -> namespace."""
    folder = Path(args.weights).parent if args.weights else Path(args.out)
    if (folder / "args.json").exists():
        run = json.loads((folder / "args.json").read_text())
    elif args.weights is None:
        raise SystemExit(f"no run in {folder} (no args.json); train one, python train.py --data shapes, "
                         "or give --weights FILE --arch ARCH --act ACT --data DATA")
    elif args.arch is None or args.act is None:
        raise SystemExit(f"--weights {args.weights} needs the --arch and --act that it was trained with")
    else:
        run = {"data": args.data or "imagenet"}
    if args.data not in (None, run["data"]):  # other data has its own folder and resolution
        run.update(data_dir=None, res=None)
    recipe = [run.get(name) for name in ("epochs", "steps", "eps", "smooth_backward", "enhanced")]
    names = "data data_dir arch act act_alpha bn_eps res classes small_input commit torch".split()
    run = {name: run.get(name) if vars(args).get(name) is None else vars(args)[name] for name in names}
    run = SimpleNamespace(**run, weights=Path(args.weights or folder / "model.pt"), recipe=recipe)
    run.res = run.res or (MODELS[run.arch].res if run.data == "imagenet" and run.arch in MODELS else 32)
    return run


def open_model(run, images, device):
    """The trained network in eval mode, channels last on a GPU, and a hash of its weights."""
    small_input = run.data != "imagenet" if run.small_input is None else run.small_input
    net = build(run.arch, run.act, len(images.classes), run.act_alpha, small_input=small_input,
                bn_eps=run.bn_eps or 1e-5)
    load_weights(net, run.weights)
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return net.to(device, memory_format=layout).eval(), digest.hexdigest()[:12]


def progress(began, n_done, n, what=""):
    """Show how far work is since `began`; Stopped if a signal came."""
    stop_if_asked()
    spent = time.monotonic() - began
    eta = duration(spent / n_done * (n - n_done)) if n_done else "?"
    show(f"{what}{int(n_done)}/{n} images | {duration(spent)} | eta {eta}")


def measure_pgd(job, ledger, members):
    """PGD on those of `members` that have no ledger line yet -> counts."""
    left = torch.tensor([i for i in members if (i, None) not in ledger.lines], dtype=torch.long)
    began, done = time.monotonic(), 0
    batches = data.eval_batches(job.images, left, job.slots, job.workers, job.device)
    numbers = job.eps / 255, job.step_size / 255, job.steps, job.restarts, job.seed
    for line in pgd_queue(job.model, batches, job.slots, *numbers, job.exact, job.last_iterate,
                          job.loss_scale, lambda: progress(began, done, len(left))):
        ledger.write(line)
        done += 1
    return tally([ledger.lines[i, None] for i in members], job.steps)


def measure_autoattack(job, ledger, members):
    """Each attack on all images that the ones before it left -> counts, seconds, warnings."""
    counts, seconds, warnings = {"n": len(members), "fooled": [], "forwards_by": []}, [], {}
    for name in ATTACKS[job.attack]:
        left = torch.tensor([i for i in members if (i, name) not in ledger.lines], dtype=torch.long)
        began, done = time.monotonic(), 0
        for index, x, y in data.eval_batches(job.images, left, job.slots, job.workers, job.device):
            _, report = autoattack(
                job.model, x, y, job.eps / 255, index, job.seed, job.exact, (name,),
                lambda _, step, steps, n_left: progress(
                    began, done + len(x) * step / steps, len(left), f"{name} "),
                loss_scale=job.loss_scale)
            rows = zip(index.tolist(), y.tolist(), report["clean"].tolist(), report["forwards"].tolist())
            for (i, label, guess, forwards), by in zip(rows, report["fooled_by"]):
                ledger.write({"index": i, "label": label, "clean": guess, "attack": name,
                              "fell": by is not None, "forwards": forwards})
            done += len(x)
            for warning in report["warnings"]:
                warnings.setdefault(warning.partition(":")[0], warning)
        seconds.append(round(time.monotonic() - began, 1))
        lines = [ledger.lines[i, name] for i in members]
        counts.setdefault("n_correct", sum(line["clean"] == line["label"] for line in lines))
        counts["fooled"].append(sum(line["fell"] for line in lines))
        counts["forwards_by"].append(sum(line["forwards"] for line in lines))
        members = [line["index"] for line in lines
                   if line["clean"] == line["label"] and not line["fell"]]
    counts.update(n_robust=len(members), forwards=sum(counts["forwards_by"]))
    return counts, seconds, list(warnings.values())


def report_lines(r):
    """A report as a person reads it."""
    def line(name, k, n):
        low, high = wilson(k, n)
        return f"{name:<9} {100 * k / n:6.2f}%  {k} of {n}, 95%: {100 * low:.2f} to {100 * high:.2f}"

    yield f"{r['weights']}: {r['arch']} {r['act']} on {r['data']} at {r['res']} px"
    if r["attack"] == "pgd":
        protocol = "last iterate, SAT's protocol" if r["last_iterate"] else "every iterate"
        yield (f"PGD-{r['steps']}, eps {r['eps']:g}, step {r['step_size']:g}, restarts {r['restarts']}, "
               f"seed {r['seed']}, {r['dtype']}, verdict of {protocol}")
    else:
        yield f"{r['attack']}, eps {r['eps']:g}, seed {r['seed']}, {r['dtype']}"
    yield line("clean", r["n_correct"], r["n"])
    yield line("robust", r["n_robust"], r["n"])
    if r["attack"] == "pgd":
        marks = [k for k in (0, 1, 2, 5, 10, 20, 50, 100) if k < r["steps"]] + [r["steps"]]
        yield "after     " + "  ".join(f"{k}: {100 * r['robust_after'][k] / r['n']:.2f}%" for k in marks)
    for name, a in r.get("attacks", {}).items():
        yield (f"{name:<9} {-100 * a['fooled'] / r['n']:6.2f}%  {a['fooled']} fell; "
               f"{a['forwards']} forwards, {duration(a['seconds'])}")
    yield (f"cost      {r['forwards']} forwards, {duration(r['seconds'])} on {r['processes']} x "
           f"{r['device']}")
    yield from (f"warning   {warning}" for warning in r.get("warnings", []))
    if r["paper"]:
        clean, robust = ("-" if v is None else f"{v}%" for v in r["paper"])
        yield f"paper     clean {clean}, robust {robust} (PGD-200, step 1, last iterate, 50,000 images)"


def main():
    args = get_args()
    run = find_run(args)
    device, rank, world = open_device(args.device, args.dtype)
    eps, step_size, steps = (default if given is None else given for given, default in
                             zip((args.eps, args.step_size, args.steps), PGD[run.data]))
    if not min(eps, steps) >= 0 or (steps and not step_size > 0):
        raise SystemExit(f"--eps {eps:g} --steps {steps} --step-size {step_size:g} is no attack; eps "
                         "and steps are 0 or more, and steps need a step size above 0")
    if args.restarts < 1 or (args.last_iterate and args.restarts > 1):
        raise SystemExit(f"--restarts {args.restarts}; use 1 or more, with --last-iterate exactly 1")
    if min(1 if n is None else n for n in (args.limit, args.batch_size)) < 1:
        raise SystemExit(f"--limit {args.limit} --batch-size {args.batch_size}; they need 1 or more")

    images = data.load(run.data, run.data_dir, False, run.res, run.classes, device=device)
    net, digest = open_model(run, images, device)
    view = attacker_view(net, args.smooth_backward == "attacker")
    job = SimpleNamespace(
        **vars(args) | dict(eps=eps, step_size=step_size, steps=steps, device=device), images=images,
        model=in_precision(view, args.dtype, device), loss_scale=LOSS_SCALE.get(args.dtype, 1.0),
        exact=None if args.dtype == "fp32" else in_precision(attacker_view(net), "fp32", device),
        slots=args.batch_size or {"cpu": 100}.get(device.type, 256 if run.data == "imagenet" else 512))
    job.workers = data.loader_processes(args.workers, run.data, world)

    # The ledger's name changes with everything that can change a verdict
    last = "-last" * args.last_iterate
    pgd = f"-step{step_size:g}-{steps}x{args.restarts}{last}" if args.attack == "pgd" else ""
    identity = data.key(digest, images.fingerprint, run.arch, run.act, run.act_alpha, run.bn_eps,
                        args.smooth_backward, args.dtype, device.type)
    name = f"{args.attack}-eps{eps:g}{pgd}-seed{args.seed}-{identity % 16**8:08x}"
    ledger = Ledger(Path(args.out) / "eval", name, rank, args.fresh)
    members = data.subset(images.n, args.limit)[rank::world].tolist()
    before = len(ledger.lines)
    if before and rank == 0:
        say(f"going on from {before} lines in {ledger.file.name}; --fresh starts over")

    listen()
    began = time.monotonic()
    try:
        if args.attack == "pgd":
            counts = summed(measure_pgd(job, ledger, members), device)
        else:
            counts, seconds, warnings = measure_autoattack(job, ledger, members)
            counts = summed(counts, device)
            attacks = {name: {"fooled": k, "forwards": f, "seconds": s} for name, k, f, s in zip(
                ATTACKS[args.attack], counts.pop("fooled"), counts.pop("forwards_by"), seconds)}
            warnings += doubts(counts["n"], {name: a["fooled"] for name, a in attacks.items()})
            counts.update(attacks=attacks, warnings=warnings)
    except Stopped:
        say(f"stopped after {len(ledger.lines) - before} lines of the ledger; the same command goes on")
        raise SystemExit(75)

    theirs = run.act_alpha is None and run.recipe in ([100, 1, 4, "none", False], [None] * 5)
    paper = PAPER.get((run.arch, run.act, run.res)) if theirs and (eps, images.n) == (4, 50000) else None
    report = {
        "weights": str(run.weights), "hash": digest,
        **{name: vars(run)[name] for name in "commit torch data arch act act_alpha res".split()},
        **{name: vars(job)[name] for name in ("attack", "eps", "step_size", "steps", "restarts", "seed",
                                              "last_iterate", "smooth_backward", "dtype")},
        **counts, "paper": paper, "interval": wilson(counts["n_robust"], counts["n"]),
        "seconds": round(time.monotonic() - began, 1), "processes": world, "device": device_name(device)}
    if rank == 0:
        if len(ledger.lines) == before and ledger.report.exists():  # nothing was left to do
            old = json.loads(ledger.report.read_text())
            report = old if old["n"] == report["n"] else report
        (part := ledger.report.with_suffix(".part")).write_text(json.dumps(report))
        part.replace(ledger.report)
        for text in report_lines(report):
            say(text)
        if args.json:
            Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
