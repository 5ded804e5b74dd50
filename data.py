"""
The pictures: ImageNet from folders, CIFAR-10 from its official files, and `shapes`, drawn from a seed.

>>> images = load("shapes", train=False)
>>> for index, x, y in eval_batches(images, subset(images.n), 100): ...  # x: (N, 3, H, W) in [0, 1]

`index` is an image's number in its whole split, always. Which images form a batch depends on (seed,
epoch, batch size), how an image is augmented on (seed, epoch, index). Workers and restarts change
neither.

Write an image folder again with smaller pictures, which load faster:
$ python data.py shrink data/imagenet data/imagenet-288 --short 288

Keys: SAT is arXiv:2006.14536.
"""
import argparse
import bisect
import hashlib
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS

from attacks import uniform

BICUBIC = T.InterpolationMode.BICUBIC  # in every resize, as in SAT's code, except in shrink:
LANCZOS = T.InterpolationMode.LANCZOS  # there bicubic would change evaluation's pixels more
# The first word of augmentation's counter in attacks.uniform. APGD's is 1 too, so training image i and
# test image i share some numbers, which does no harm; another word would change every crop and flip
AUGMENT = 1
SHAPES_SEED = -1  # every other seed is 0 or more, so nothing else draws the pictures' numbers again
PAD = 4  # zeros around an image in memory, of which a random crop takes a part
MOST_UNREADABLE = 100  # in a row: the disk is at fault, not a file


def key(*words):
    """A 63-bit hash of its arguments: a generator's seed, as key(seed, epoch, index), or a digest."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class Images:
    """One split: labels y (n,) int64; pixels x (n, 3, H, W) uint8 on the device, or files below root."""

    classes: list
    res: int
    y: torch.Tensor
    x: torch.Tensor = None
    root: Path = None
    paths: np.ndarray = None  # relative to root; one array, whose memory the loader's workers share

    @property
    def n(self):
        return len(self.y)

    def file(self, index):
        return self.root / str(self.paths[index])

    def names_hash(self):
        """A hex digest of which images these are and of their labels, not of their pixels."""
        names = [] if self.paths is None else self.paths.tolist()
        return f"{key(self.res, self.classes, names, self.y.tolist()):016x}"

    def fingerprint(self):
        """A hex digest of the pixels in memory; of files it sees the names and sizes, and no more."""
        digest = hashlib.sha256(self.names_hash().encode())
        if self.x is not None:
            digest.update(self.x.cpu().contiguous().numpy())
        else:
            sizes = [self.file(index).stat().st_size for index in range(self.n)]
            digest.update(repr(sizes).encode())
        return digest.hexdigest()[:12]


def write_whole(path, write, previous=None):
    """Call write(file) on a hidden file beside `path`, flush it to the disk and rename it.

    So `path` never holds half of a file. previous: where the old file is kept.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def reason(error):
    """Why a file could not be read or written, without its name, which the caller knows."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# The terminal

def is_first():
    """Whether this is torchrun's first process, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def show(text):
    """A line on the terminal that the next one overwrites; nothing unless stdout is a terminal."""
    if is_first() and sys.stdout.isatty():
        print(f"\r\033[K{printable(text)}", end="", flush=True)


def say(text):
    """A line that stays, by the first process."""
    if is_first():
        show("")
        print(printable(text), flush=True)


def printable(text):
    """The text, in which a byte of a file name that is not UTF-8 is written as \\xe9."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def duration(seconds):
    """3h12m, or below an hour 4m05s."""
    minutes, seconds = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s"


# The three data sets

@dataclass(frozen=True)
class DataSpec:
    """All that depends on the data set."""

    load: Callable  # (folder, train, res, download) -> Images
    folder: str  # unless --data-dir names another
    res: int  # the default resolution; None: the network's own
    least_res: int
    most_res: int
    small_input: bool  # networks get a 3x3 stem without max-pool
    # evaluation's attack, the radius and step size in 1/255
    eps: float
    step_size: float
    steps: int
    eval_batch: int  # images at a time on a GPU
    can_download: bool = False


def load(name, data_dir=None, train=True, res=32, classes=None, download=False, device="cpu"):
    """One split of a data set -> Images. classes: a trained model's, to map the labels by name.

    SystemExit if name, files, resolution or classes are missing or do not fit.
    """
    if name not in DATA_SETS:
        raise SystemExit(f"--data {name} is unknown; use one of {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    if download and not data_set.can_download:
        raise SystemExit(f"--download fetches cifar10 only, not {name}; drop it")
    if not data_set.least_res <= res <= data_set.most_res:
        raise SystemExit(f"--res {res} does not fit {name}; the least is {data_set.least_res}, the most "
                         f"{data_set.most_res}")
    folder = Path(data_set.folder if data_dir is None else data_dir).expanduser()
    images = data_set.load(folder, train, res, download)
    if classes is not None:
        unknown = [own for own in images.classes if own not in classes]
        if unknown:
            raise SystemExit(f"{folder} has unknown classes, e.g. {unknown[0]}; the model knows "
                             f"{len(classes)}, e.g. {classes[0]}; give the --data-dir of its training")
        position = torch.tensor([classes.index(own) for own in images.classes])
        images.y = position[images.y]
        images.classes = classes
    if len(images.classes) < 2:
        raise SystemExit(f"{folder} has one class, {images.classes[0]}; give data with two or more")
    if images.x is not None:
        images.x = images.x.to(device)
        images.y = images.y.to(device)
    return images


def visible(names):
    """Sorted, without hidden names: Jupyter leaves .ipynb_checkpoints, a Mac ._cat.jpg with cat.jpg."""
    return sorted(name for name in names if not name.startswith("."))


def find_pictures(root):
    """The pictures below a folder, as paths relative to it, in the order of torchvision's ImageFolder.

    Links to folders are followed after the real folders, and only to folders not seen yet: no picture
    comes twice, and a link that leads back up does not loop.
    """
    found = []  # (class, folder, name), which torchvision sorts by
    left_out = []
    errors = []
    seen = {str(folder) for folder in root.resolve().parents}  # a link to one of them would loop
    starts = [root]  # links to folders are appended: os.walk does not follow them
    while starts:
        for folder, subfolders, files in os.walk(starts.pop(0), onerror=errors.append):
            folder = Path(folder)
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = visible(subfolders)
            for name in subfolders:
                link = folder / name
                if link.is_symlink():
                    starts.append(link)
            below = folder.relative_to(root)
            for name in visible(files):
                if name.lower().endswith(IMG_EXTENSIONS):
                    found.append((below.parts[:1], str(below), name))
                else:
                    left_out.append(f"{folder / name} (its name does not end like a picture's)")
    for error in errors:
        left_out.append(f"{error.filename} ({reason(error)})")
    if left_out and root.exists():  # if it does not, the caller says so
        say(f"left out files or folders: {len(left_out)}, e.g. {left_out[-1]}")
    return [os.path.normpath(os.path.join(folder, name)) for _, folder, name in sorted(found)]


def imagenet(folder, train, res, download):
    """{train,val}/<class>/* below the folder."""
    root = folder / ("train" if train else "val")
    paths = [path for path in find_pictures(root) if os.sep in path]  # in root itself: without a class
    if not paths:
        raise SystemExit(f"no images under {root}; --data imagenet needs its --data-dir to hold "
                         "{train,val}/<class>/*.JPEG; to try it without data, use --data shapes")
    classes, y = np.unique([path.split(os.sep)[0] for path in paths], return_inverse=True)
    for name in visible(os.listdir(root)):
        if name not in classes and (root / name).is_dir():
            raise SystemExit(f"{root / name} holds no image of its own, and every folder there is a "
                             "class; remove it, or fill it")
    return Images(classes.tolist(), res, torch.from_numpy(y), root=root, paths=np.array(paths))


def cifar10(folder, train, res, download):
    """cifar-10-batches-py below the folder, as torchvision reads it."""
    try:
        files = CIFAR10(folder, train=train, download=download)  # it compares md5 sums first
    except (OSError, RuntimeError) as error:
        if download:
            raise SystemExit(f"cannot fetch CIFAR-10 ({reason(error)}); is there a network? Or put its "
                             f"cifar-10-batches-py into {folder} by hand")
        raise SystemExit(f"no CIFAR-10 in {folder}/cifar-10-batches-py ({reason(error)}); say where it "
                         "is with --data-dir, or add --download")
    x = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()  # (n, 32, 32, 3) -> (n, 3, 32, 32)
    return Images(files.classes, 32, torch.tensor(files.targets), x)


def shapes(folder, train, res, download):
    """Drawn here and now; no folder is read."""
    x, y = draw_shapes(6000 if train else 1000, res, train)
    return Images(SHAPES, res, y, x)


DATA_SETS = {
    "imagenet": DataSpec(imagenet, "data/imagenet", res=None, least_res=32, most_res=4096,
                        small_input=False, eps=4, step_size=1, steps=200, eval_batch=256),
    "cifar10": DataSpec(cifar10, "data", res=32, least_res=32, most_res=32, small_input=True,
                       eps=8, step_size=2, steps=50, eval_batch=512, can_download=True),
    "shapes": DataSpec(shapes, "", res=32, least_res=16, most_res=1024, small_input=True,
                      eps=8, step_size=2, steps=50, eval_batch=512),
}


# Shapes

SHAPES = ["disc", "ring", "square", "frame", "triangle", "star", "cross", "bar", "crescent", "pair"]


def distances(u, v):
    """For each of SHAPES a function of (u, v): negative inside, 0 on the edge, about its distance."""
    right = u.abs()
    up = v.abs()
    radius = torch.hypot(u, v)
    less = torch.minimum(right, up)
    more = torch.maximum(right, up)
    return [
        radius - 0.9,
        (radius - 0.75).abs() - 0.22,
        more - 0.8,
        (more - 0.65).abs() - 0.2,
        torch.maximum(-v, 0.87 * right + 0.5 * v) - 0.55,
        radius - 0.7 - 0.35 * torch.cos(5 * torch.atan2(u, v)),
        torch.maximum(less - 0.25, more - 1),
        torch.maximum(right - 1.1, up - 0.3),
        torch.maximum(radius - 1, 0.8 - torch.hypot(u - 0.5, v)),
        torch.hypot(right - 0.62, v) - 0.42,
    ]


def draw_shapes(n, res, train):
    """Ten procedural classes -> x (n, 3, res, res) uint8, y (n,) int64; images of a split never change.

    The shape, and its hue a little, is the cue that survives an attack. A grating of 4/255, whose
    frequency depends on the class, is the one that does not (cf. Ilyas et al. 2019, arXiv:1905.02175).
    The numbers were found by trial: a net trained with an attack withstands it, a normal one does not.
    """
    x = torch.empty(n, 3, res, res, dtype=torch.uint8)
    y = torch.arange(n) % len(SHAPES)
    split = 1 if train else 0
    row = torch.arange(res)[:, None]
    column = torch.arange(res)
    channel = torch.arange(3)[:, None, None, None]
    for index in torch.arange(n).split(max(1, 2**20 // res**2)):  # bounded memory at any resolution
        # `_` is drawn and not used: without it the numbers after it, and the pictures, would change
        draws = uniform(SHAPES_SEED, index, (split, 0), (14,)).T[..., None, None]  # -> (14, N, 1, 1)
        (left, top, scale, angle, _, slope_u, slope_v, phase_row, phase_column, tone,
         red, green, blue, contrast) = draws

        # Where each pixel lies in the shape's own axes: moved, turned, scaled
        size = 0.5 + 0.2 * scale
        turn = 0.6 * angle - 0.3
        moved_x = (column + 0.5) * 2 / res - 0.85 - 0.3 * left
        moved_y = (row + 0.5) * 2 / res - 0.85 - 0.3 * top
        u = (moved_x * turn.cos() - moved_y * turn.sin()) / size
        v = (moved_y * turn.cos() + moved_x * turn.sin()) / size
        of_every_shape = torch.stack(distances(u, v))  # (10, N, res, res)
        edge = of_every_shape[y[index], torch.arange(len(index))]  # (N, res, res)
        inside = (0.5 - edge * size * res / 2).clamp(0, 1)  # an edge about one pixel wide, not jagged

        # Its colour, the ground it stands on, the grating over both, and noise
        class_share = y[index, None, None] / len(SHAPES)  # the class's number, in [0, 1)
        hue = math.tau * (class_share + 0.4 * tone - 0.2)
        tint = 1 + 0.5 * torch.cos(hue - math.tau / 3 * channel)  # (3, N, 1, 1)
        ground = 0.15 + 0.2 * torch.stack([red, green, blue])
        ground = ground + 0.1 * (u * (slope_u - 0.5) + v * (slope_v - 0.5))
        frequency = math.pi * (0.5 + 0.5 * class_share)  # radians per pixel
        waves_down = torch.cos(frequency * row + 6.3 * phase_row)  # 6.3 is about 2 pi
        grating = waves_down * torch.cos(frequency * column + 6.3 * phase_column)
        image = ground + inside * (0.16 + 0.28 * contrast) * tint + 4 / 255 * grating  # (3, N, res, res)
        noise = 0.1 * uniform(SHAPES_SEED, index, (split, 1), (3, res, res)) - 0.05
        image = image.transpose(0, 1) + noise
        x[index] = (image * 255).round().clamp(0, 255).byte()
        show(f"drawing shapes {index[-1] + 1}/{n}")
    show("")
    return x, y


# Which images (members: their numbers, sorted), and batches of them

def fixed_order(n):
    """One permutation of 0 .. n-1, the same everywhere: folders come sorted by class."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def subset(n, limit=None):
    """The first `limit` of one fixed permutation of 0 .. n-1, sorted."""
    return fixed_order(n)[:limit].sort().values


def hold_out(n, limit=None, holdout=0):
    """Numbers of the images to train on, at most `limit`, and of those held out; both sorted.

    Held out are the last `holdout` of the fixed order, at most a tenth of min(n, limit).
    """
    most = min(n, limit or n) // 10
    n_train = n - min(holdout, most)
    order = fixed_order(n)
    members = order[:n_train][:limit]
    held_out = order[n_train:]
    return members.sort().values, held_out.sort().values


def epoch_batches(members, epoch, seed, batch_size, world=1):
    """The epoch's global batches, (n_steps, batch_size) int64: image numbers in the epoch's order.

    A short last batch is dropped. An epoch smaller than one batch is a single batch, cut to a multiple
    of `world`; with fewer than two images per process there is none.
    """
    shuffle = torch.Generator().manual_seed(key(seed, epoch))
    order = members[torch.randperm(len(members), generator=shuffle)]
    n_steps = len(order) // batch_size
    if n_steps == 0:
        batch_size = len(order) // world * world
        n_steps = 1 if batch_size >= 2 * world else 0  # BatchNorm over a single image is refused
    return order[: n_steps * batch_size].view(n_steps, batch_size)


def train_batches(images, members, batch_size, epochs, seed=0, start=(0, 0), rank=0, world=1, workers=0,
                  device="cpu", autoaugment=False):
    """Yields this rank's (index, x, y) of each step, from `start` = (epoch, step) to the last epoch.

    One stream over all epochs: no worker stops between two, and a resumed run joins in at its step.
    """
    def plan():
        for epoch in range(start[0], epochs):
            batches = epoch_batches(members, epoch, seed, batch_size, world)[:, rank::world]
            if epoch == start[0]:
                batches = batches[start[1]:]
            yield epoch, batches

    if images.x is None:
        files = Files(images, members, train_transform(images.res, autoaugment), seed)
        yield from from_files(files, plan(), workers, device)
        return

    # From memory: what an epoch needs goes to the device once, so that no step waits for a copy
    policy = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)
    padded = F.pad(images.x, (PAD, PAD, PAD, PAD))
    for epoch, batches in plan():
        index = batches.to(device)  # (n_steps, N)
        y = images.y[index]
        u = uniform(seed, index.flatten(), (AUGMENT, epoch), (3,)).view(*index.shape, 3)
        row, column = crop_and_flip(u, images.res)  # (n_steps, N, res)
        for step in range(len(batches)):
            x = padded[index[step, :, None, None], :, row[step, :, :, None], column[step, :, None]]
            x = x.permute(0, 3, 1, 2)  # (N, res, res, 3) -> (N, 3, res, res)
            if autoaugment:
                pictures = []
                for number, picture in zip(batches[step].tolist(), x):
                    pictures.append(seeded(key(seed, epoch, number), policy, picture))
                x = torch.stack(pictures)
            yield index[step], x.float().div_(255), y[step]


def eval_batches(images, members, batch_size, workers=0, device="cpu"):
    """Yields (index, x, y) of `members` in order, not augmented; nothing padded, nothing dropped."""
    if len(members) == 0:
        return
    if images.x is None:
        files = Files(images, members, eval_transform(images.res))
        yield from from_files(files, [(0, members.split(batch_size))], workers, device)
        return
    for index in members.to(device).split(batch_size):
        yield index, images.x[index].float().div_(255), images.y[index]


def crop_and_flip(u, res):
    """Crops of a padded image, half of them mirrored; u (..., 3) -> rows, columns (..., res) int64."""
    position = torch.arange(res, device=u.device)
    top, left = (u[..., :2] * (2 * PAD + 1)).long().unbind(-1)
    column = torch.where(u[..., 2:] < 0.5, position, position.flip(0))
    return top[..., None] + position, left[..., None] + column


# Image files

def train_transform(res, autoaugment=False):
    """Random resized crop and flip, to uint8 (3, res, res)."""
    steps = [T.RandomResizedCrop(res, interpolation=BICUBIC), T.RandomHorizontalFlip()]
    if autoaugment:
        steps.append(T.AutoAugment(T.AutoAugmentPolicy.IMAGENET))
    return T.Compose([*steps, T.PILToTensor()])


def eval_transform(res):
    """Shorter side to res + 32 (SAT: 256, 331, 412), below 224 px to 8/7 of res; then a centre crop."""
    shorter_side = res + min(32, res // 7)
    return T.Compose([T.Resize(shorter_side, BICUBIC), T.CenterCrop(res), T.PILToTensor()])


def seeded(seed, function, *arguments):
    """function(*arguments) with torch's CPU generator seeded, and left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return function(*arguments)


def to_rgb(picture):
    """8 bits a channel. Pillow's own convert clips 16-bit grey to white, floats in [0, 1] to black."""
    # In mode I, PNG and PPM hold 16 bits; a TIFF holds 32 and is refused below
    sixteen_bits = picture.mode == "I" and picture.format in ("PNG", "PPM")
    if sixteen_bits or picture.mode.startswith("I;16"):
        high_byte = (np.asarray(picture) >> 8).astype(np.uint8)
        picture = Image.fromarray(high_byte)
    if picture.mode in ("I", "F"):
        raise ValueError(f"Pillow's mode {picture.mode}, which does not fit 8 bits")
    return picture.convert("RGB")


def read_picture(file):
    with Image.open(file) as picture:
        return to_rgb(picture)


class Files(Dataset):
    """(epoch, index) -> index, uint8 image, label.

    In training the next member replaces an unreadable image; evaluation (seed None) has to stop.
    """

    def __init__(self, images, members, transform, seed=None):
        self.images = images
        self.members = members.tolist()
        self.transform = transform
        self.seed = seed

    def __getitem__(self, item):
        epoch, index = item
        for _ in range(MOST_UNREADABLE):
            file = self.images.file(index)
            try:
                picture = read_picture(file)
                break
            except Exception as error:  # Pillow raises half a dozen kinds for a damaged file
                sentence = f"cannot read {file} ({reason(error)})"
            if self.seed is None:
                raise OSError(f"{sentence}; fix it: skipping it would change the score")
            print(printable(f"{sentence}; training takes the next image"), flush=True)
            after = bisect.bisect(self.members, index)
            index = self.members[after % len(self.members)]
        else:
            raise OSError(f"{sentence}, nor the {MOST_UNREADABLE - 1} images before it; is the disk "
                          "still there?")
        x = seeded(key(self.seed, epoch, index), self.transform, picture)
        return torch.tensor(index), x, self.images.y[index]


def from_files(files, plan, workers, device):
    """The batches of `plan`, (epoch, its batches) each, read by worker processes -> (index, x, y)."""
    def requests():
        for epoch, batches in plan:  # made as the loader asks for them
            for index in batches:
                yield [(epoch, number) for number in index.tolist()]

    for index, x, y in from_workers(files, requests(), workers, pin_memory="cuda" in str(device)):
        index = index.to(device, non_blocking=True)
        x = x.to(device, non_blocking=True)
        y = y.to(device, non_blocking=True)
        yield index, x.float().div_(255), y


# Worker processes

def n_cores():
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def loader_workers(workers, images, world):
    """`workers` if given, or as many as the cores allow each process; images in memory need none."""
    if workers is not None:
        return workers
    if images.x is not None:
        return 0
    cores_each = n_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return max(1, min(12, cores_each - 1))  # more than a dozen take memory and rarely help


def leave_session(_):
    """Put a worker into a session of its own: Ctrl-C reaches only the main process, which ends it."""
    os.setsid()


def from_workers(dataset, requests, workers, pin_memory=False):
    """For each request, a list of items, yields [dataset[item], ...] collated, in their order.

    The workers end with this generator, whatever ends it, and within seconds of a main process that
    was killed. Tensors are stacked in shared memory, in the worker: where it is full, that raises.
    """
    loader = DataLoader(dataset, batch_sampler=requests, num_workers=workers, pin_memory=pin_memory,
                        worker_init_fn=leave_session,
                        generator=torch.Generator())  # or it would advance torch's global one
    batches = iter(loader)
    try:
        yield from batches
    except OSError as error:  # our own sentence, the end of a worker's traceback
        raise SystemExit(str(error).strip().rpartition("OSError: ")[2]) from None
    except RuntimeError as error:
        text = str(error).strip()
        if "shared memory" in text:
            raise SystemExit(f"no room in /dev/shm for the batches of {workers} workers; use fewer "
                             "--workers, a smaller --batch-size, or docker run --shm-size 8g") from None
        if text.startswith("DataLoader"):  # a worker has died
            raise SystemExit(f"{text}; is there enough memory? Use fewer than --workers "
                             f"{workers}") from None
        raise
    finally:
        if workers > 0:
            batches._shutdown_workers()  # now, although a traceback may still refer to the iterator


# Shrink: an image folder again, with smaller pictures

class Shrink(Dataset):
    """A picture's path -> "", and the picture is written; or why it cannot be read."""

    def __init__(self, source, target, short):
        self.source = source
        self.target = target
        self.short = short

    def __getitem__(self, path):
        source = self.source / path
        target = self.target / path
        try:
            picture = read_picture(source)
        except Exception as error:  # Pillow raises half a dozen kinds for a damaged file
            return f"{source} ({reason(error)})"

        def write(file):
            if min(picture.size) <= self.short:
                file.write(source.read_bytes())
                return
            smaller = T.Resize(self.short, LANCZOS)(picture)
            image_format = Image.registered_extensions()[source.suffix.lower()]  # a PNG stays a PNG
            if image_format in ("JPEG", "WEBP"):
                smaller.save(file, image_format, quality=95)
            else:  # a compressed TIFF refuses a quality
                smaller.save(file, image_format)

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, write)
        except OSError as error:
            raise OSError(f"cannot write {target} ({reason(error)}); once that is fixed, the same "
                          "command goes on")
        return ""


def shrink(source, target, short, workers):
    """Write every picture below `source` again below `target` -> exit code, 1 if one was unreadable."""
    paths = find_pictures(source)
    if not paths:
        raise SystemExit(f"no pictures below {source}; FROM is a folder with pictures in class folders")
    remaining = [path for path in paths if not (target / path).exists()]  # what is there is whole
    n_there = len(paths) - len(remaining)
    say(f"{n_there} of {len(paths)} pictures are there already")
    began = time.monotonic()
    unreadable = []
    requests = ([path] for path in remaining)
    for n_done, answer in enumerate(from_workers(Shrink(source, target, short), requests, workers), 1):
        unreadable += filter(None, answer)
        seconds_each = (time.monotonic() - began) / n_done
        time_left = duration(seconds_each * (len(remaining) - n_done))
        show(f"{n_there + n_done}/{len(paths)} pictures | {time_left} left")
    for line in unreadable:
        say(f"skipped {line}")
    n_unreadable = len(unreadable)
    n_written = len(paths) - n_unreadable
    say(f"{n_written} of {len(paths)} pictures are in {target}; {n_unreadable} unreadable")
    return 1 if unreadable else 0


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare data; training itself needs none of this.")
    parser.add_argument("command", choices=["shrink"], help="write a folder again with smaller pictures")
    parser.add_argument("source", metavar="FROM", type=Path, help="folder of pictures: data/imagenet")
    parser.add_argument("target", metavar="TO", type=Path, help="folder to write, new or to go on in")
    parser.add_argument("--short", type=int, default=288, help="most pixels of the shorter side")
    parser.add_argument("--workers", type=int, default=n_cores(), help="processes; default: the cores")
    args = parser.parse_args(argv)
    if args.short < 32 or args.workers < 0:
        parser.error("--short needs at least 32 pixels, --workers 0 or more processes")
    return args


def main():
    args = get_args()
    try:
        return shrink(args.source, args.target, args.short, args.workers)
    except KeyboardInterrupt:
        show("")
        raise SystemExit("stopped; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
