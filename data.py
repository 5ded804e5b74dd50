"""
The pictures: ImageNet from folders, CIFAR-10 from its official files, and `shapes`, drawn from a seed.

>>> images = load("shapes", train=False)
>>> for index, x, y in eval_batches(images, subset(images.n), 100): ...  # x: (N, 3, H, W) in [0, 1]

`index` is an image's number in its whole split, always. Which images make a batch depends on (seed,
epoch), what augmentation does to one on (seed, epoch, index): not on workers, processes or a restart.

Write an image folder again with smaller pictures, which load faster:
$ python data.py shrink data/imagenet data/imagenet-288 --short 288

Keys: SAT is arXiv:2006.14536.
"""
import argparse
import bisect
import hashlib
import io
import math
import os
import signal
import sys
import time
import zlib
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Callable

if __name__ == "__main__":  # importing torch takes seconds; a Ctrl-C meanwhile prints no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from attacks import uniform

BICUBIC = T.InterpolationMode.BICUBIC  # everywhere, as in SAT's code
AUGMENT = 1  # first word of uniform's counter; APGD uses 1 too, but never on training images
SHAPES_SEED = -1  # of the pictures; attacks and crops have seeds from 0 on, so they never share numbers
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
    unreadable: list = field(default_factory=list)  # what training could not read, for its log

    @property
    def n(self):
        return len(self.y)

    def file(self, index):
        return self.root / str(self.paths[index])

    def names_hash(self):
        """A hex digest of which images these are and of their labels, not of their pixels."""
        names = []
        if self.paths is not None:
            names = [Path(path).parts for path in self.paths.tolist()]
        return f"{key(self.res, self.classes, names, self.y.tolist()):016x}"

    def fingerprint(self, progress=None):
        """A hex digest of the content: the pixels in memory, or each file's name, size and checksum.

        `progress(n_done, n)` is called as the files are read.
        """
        digest = hashlib.sha256()
        digest.update(self.names_hash().encode())
        if self.x is not None:
            digest.update(self.x.cpu().contiguous().numpy().tobytes())
            return digest.hexdigest()[:12]
        files = (self.file(index) for index in range(self.n))
        n_done = 0
        with ThreadPool(8) as threads:  # reading and checksums run outside of Python's lock
            try:
                for size_and_checksum in threads.imap(checksum, files, chunksize=16):
                    digest.update(repr(size_and_checksum).encode())
                    n_done += 1
                    if progress is not None:
                        progress(n_done, self.n)
            except OSError as error:
                raise SystemExit(f"cannot read {error.filename} ({reason(error)}); fix it, or remove it "
                                 "from the data")
        return digest.hexdigest()[:12]


def checksum(file):
    content = file.read_bytes()
    return len(content), zlib.crc32(content)


def reason(error):
    """Why a file could not be read or written, without its name, which the caller knows."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return str(error) or type(error).__name__


# The terminal

def show(text):
    """A line on the terminal that the next one overwrites; nothing unless stdout is a terminal."""
    if sys.stdout.isatty() and os.environ.get("RANK", "0") == "0":
        print(f"\r\033[K{text}", end="", flush=True)


def say(text):
    """A line that stays. Where nobody reads any more, as behind `| head`, the work goes on silently."""
    show("")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        raise SystemExit(f"--res {res} does not fit {name}; use {data_set.least_res} to "
                         f"{data_set.most_res}")
    folder = Path(data_set.folder if data_dir is None else data_dir)
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


class VisibleImages(ImageFolder):
    """torchvision's ImageFolder, its order and its numbers, without hidden folders and hidden files.

    Jupyter leaves .ipynb_checkpoints beside the classes, and a Mac ._cat.jpg beside each cat.jpg.
    """

    def __init__(self, root):
        prefix = os.path.join(root, "")

        def is_valid_file(path):
            return is_picture(path.removeprefix(prefix))

        super().__init__(root, is_valid_file=is_valid_file, allow_empty=True)
        self.paths = [path.removeprefix(prefix) for path, _ in self.samples]

    def find_classes(self, directory):
        classes, _ = super().find_classes(directory)
        visible = [name for name in classes if not name.startswith(".")]
        return visible, {name: number for number, name in enumerate(visible)}


def is_picture(path):
    """Whether a path, relative to its data set, has a picture's ending and no hidden part."""
    hidden = any(part.startswith(".") for part in path.split(os.sep))
    return path.lower().endswith(IMG_EXTENSIONS) and not hidden


def imagenet(folder, train, res, download):
    """{train,val}/<class>/* below the folder."""
    root = folder.expanduser() / ("train" if train else "val")
    try:
        listed = VisibleImages(root)
    except (OSError, ValueError):  # no such folder, or no class in it
        listed = None
    if listed is None or not listed.paths:
        raise SystemExit(f"no images under {root}; --data imagenet needs its --data-dir to hold "
                         "{train,val}/<class>/*.JPEG; see it move without any: --data shapes")
    y = torch.tensor(listed.targets)
    n_images = torch.bincount(y, minlength=len(listed.classes)).tolist()
    for name, n in zip(listed.classes, n_images):
        if n == 0:
            raise SystemExit(f"{root / name} holds no image, and every folder there is a class; remove "
                             "it, or fill it")
    return Images(listed.classes, res, y, root=root, paths=np.array(listed.paths))


def cifar10(folder, train, res, download):
    """cifar-10-batches-py below the folder, as torchvision reads it."""
    try:
        files = CIFAR10(folder, train=train, download=download)  # it compares md5 sums first
    except (OSError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise SystemExit(f"no CIFAR-10 in {folder}/cifar-10-batches-py ({why}); say where it is with "
                         "--data-dir, or add --download")
    x = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()  # (n, 32, 32, 3) -> (n, 3, 32, 32)
    return Images(files.classes, 32, torch.tensor(files.targets), x)


def shapes(folder, train, res, download):
    """Drawn here and now; no folder is read."""
    x, y = draw_shapes(6000 if train else 1000, res, train)
    return Images(list(SHAPES), res, y, x)


DATA_SETS = {
    "imagenet": DataSpec(imagenet, "data/imagenet", res=None, least_res=32, most_res=4096,
                        small_input=False, eps=4, step_size=1, steps=200, eval_batch=256),
    "cifar10": DataSpec(cifar10, "data", res=32, least_res=32, most_res=32, small_input=True,
                       eps=8, step_size=2, steps=50, eval_batch=512, can_download=True),
    "shapes": DataSpec(shapes, "", res=32, least_res=16, most_res=1024, small_input=True,
                      eps=8, step_size=2, steps=50, eval_batch=512),
}


# Shapes: the signed distance to the edge of each at (u, v), negative inside

def disc(u, v):
    return torch.hypot(u, v) - 0.9


def ring(u, v):
    return (torch.hypot(u, v) - 0.75).abs() - 0.22


def square(u, v):
    return torch.maximum(u.abs(), v.abs()) - 0.8


def frame(u, v):
    return (torch.maximum(u.abs(), v.abs()) - 0.65).abs() - 0.2


def triangle(u, v):
    return torch.maximum(-v, 0.87 * u.abs() + 0.5 * v) - 0.55


def star(u, v):
    return torch.hypot(u, v) - 0.7 - 0.35 * torch.cos(5 * torch.atan2(u, v))


def cross(u, v):
    arms = torch.minimum(u.abs(), v.abs()) - 0.25
    ends = torch.maximum(u.abs(), v.abs()) - 1
    return torch.maximum(arms, ends)


def bar(u, v):
    return torch.maximum(u.abs() - 1.1, v.abs() - 0.3)


def crescent(u, v):
    return torch.maximum(torch.hypot(u, v) - 1, 0.8 - torch.hypot(u - 0.5, v))


def pair(u, v):
    return torch.hypot(u.abs() - 0.62, v) - 0.42


SHAPES = {"disc": disc, "ring": ring, "square": square, "frame": frame, "triangle": triangle,
          "star": star, "cross": cross, "bar": bar, "crescent": crescent, "pair": pair}


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
        edge = torch.empty(len(index), res, res)
        for number, distance in enumerate(SHAPES.values()):
            own = y[index] == number
            edge[own] = distance(u[own], v[own])
        inside = (0.5 - edge * size * res / 2).clamp(0, 1)  # an edge one pixel wide, not jagged

        # Its colour, the ground it stands on, the grating over both, and noise
        class_share = y[index, None, None] / len(SHAPES)  # the class's number, in [0, 1)
        hue = 2 * math.pi * (class_share + 0.4 * tone - 0.2)
        tint = 1 + 0.5 * torch.cos(hue - 2 * math.pi / 3 * channel)  # (3, N, 1, 1)
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
    """Numbers of the images to train on, and of those held out, at most a tenth of all in use."""
    most = min(n, limit or n) // 10
    n_train = n - min(holdout, most)
    order = fixed_order(n)
    return order[:n_train][:limit].sort().values, order[n_train:].sort().values


def epoch_batches(members, epoch, seed, batch_size, world=1):
    """The epoch's global batches, a list of index tensors of batch_size each, in the epoch's order.

    A short last batch is dropped. An epoch smaller than one batch is a single batch, cut to a multiple
    of `world`; with less than two images per process there is none.
    """
    shuffle = torch.Generator().manual_seed(key(seed, epoch))
    order = members[torch.randperm(len(members), generator=shuffle)]
    if len(order) >= batch_size:
        return [batch for batch in order.split(batch_size) if len(batch) == batch_size]
    order = order[: len(order) // world * world]
    return [order] if len(order) > world else []  # BatchNorm needs two images on each process


def train_batches(images, members, batch_size, epochs, seed=0, start=(0, 0), rank=0, world=1, workers=0,
                  device="cpu", autoaugment=False):
    """Yields this rank's (index, x, y) of each step, from `start` = (epoch, step) to the last epoch.

    One stream over all epochs: no worker stops between two, and a resumed run joins in at its step.
    """
    def plan():
        for epoch in range(start[0], epochs):
            for step, batch in enumerate(epoch_batches(members, epoch, seed, batch_size, world)):
                if (epoch, step) >= start:
                    yield epoch, batch[rank::world]

    if images.x is None:
        files = Files(images, members, train_transform(images.res, autoaugment), seed)
        yield from from_files(files, plan(), workers, device)
        return
    policy = T.AutoAugment(T.AutoAugmentPolicy.CIFAR10)
    for epoch, index in plan():
        index = index.to(device)
        x = crop_and_flip(images.x[index], uniform(seed, index, (AUGMENT, epoch), (3,)))
        if autoaugment:
            pictures = []
            for number, picture in zip(index.tolist(), x):
                pictures.append(seeded(key(seed, epoch, number), policy, picture))
            x = torch.stack(pictures)
        yield index, x.float().div_(255), images.y[index]


def eval_batches(images, members, batch_size, workers=0, device="cpu"):
    """Yields (index, x, y) of `members` in order, not augmented; nothing padded, nothing dropped."""
    plan = [index for index in members.split(batch_size) if len(index) > 0]
    if images.x is None:
        files = Files(images, members, eval_transform(images.res))
        yield from from_files(files, [(0, index) for index in plan], workers, device)
        return
    for index in plan:
        index = index.to(device)
        yield index, images.x[index].float().div_(255), images.y[index]


def crop_and_flip(x, u, pad=4):
    """Pad by 4 zeros, crop at random, mirror half: x (N, 3, H, W) and u (N, 3) in [0, 1) -> as x."""
    n, _, h, w = x.shape
    top, left = (u[:, :2] * (2 * pad + 1)).long().T
    unchanged = u[:, 2:] < 0.5
    row = top[:, None] + torch.arange(h, device=x.device)  # (N, H)
    column = torch.arange(w, device=x.device).expand(n, w)
    column = torch.where(unchanged, column, w - 1 - column)
    column = left[:, None] + column  # (N, W)
    image = torch.arange(n, device=x.device)[:, None, None]
    padded = F.pad(x, (pad, pad, pad, pad))
    cropped = padded[image, :, row[:, :, None], column[:, None]]  # (N, H, W, 3)
    return cropped.permute(0, 3, 1, 2)


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
    """8 bits a channel from any picture; Pillow alone clips 16-bit greys to white."""
    if picture.mode.startswith("I"):
        high_byte = (np.asarray(picture) >> 8).astype(np.uint8)
        picture = Image.fromarray(high_byte)
    return picture.convert("RGB")


def read_picture(file):
    with Image.open(file) as picture:
        return to_rgb(picture)


class Files(Dataset):
    """(epoch, index) -> index, uint8 image or None, label, [str] the files that could not be read.

    In training the next member replaces an unreadable image; evaluation (seed None) has to stop.
    """

    def __init__(self, images, members, transform, seed=None):
        self.images = images
        self.members = members.tolist()
        self.transform = transform
        self.seed = seed
        self.n_attempts = 1 if seed is None else MOST_UNREADABLE

    def __getitem__(self, item):
        epoch, index = item
        unreadable = []
        for _ in range(self.n_attempts):
            file = self.images.file(index)
            try:
                picture = read_picture(file)
            except Exception as error:  # Pillow raises half a dozen kinds for a damaged file
                unreadable.append(f"{file} ({reason(error)})")
                after = bisect.bisect(self.members, index)
                index = self.members[after % len(self.members)]
            else:
                x = seeded(key(self.seed, epoch, index), self.transform, picture)
                return index, x, self.images.y[index], unreadable
        return index, None, self.images.y[index], unreadable


def collate(items):
    """A list of what `Files` gives -> index (N,), x (N, 3, H, W) or None, y (N,), unreadable [str]."""
    index, x, y, unreadable = zip(*items)
    if any(image is None for image in x):
        stacked = None
    else:
        stacked = torch.stack(x)
    return torch.tensor(index), stacked, torch.stack(y), sum(unreadable, [])


def from_files(files, plan, workers, device):
    """The batches of `plan`, (epoch, index) each, read by worker processes -> (index, x, y)."""
    def requests():
        for epoch, index in plan:  # made as the loader asks for them
            yield [(epoch, number) for number in index.tolist()]

    pin_memory = "cuda" in str(device)
    for index, x, y, unreadable in from_workers(files, requests(), collate, workers, pin_memory):
        if x is None and files.seed is None:
            raise SystemExit(f"cannot read {unreadable[-1]}; fix it: skipping it would change the score")
        if x is None:
            raise SystemExit(f"cannot read {unreadable[-1]} and {MOST_UNREADABLE - 1} images before it; "
                             "is the disk still there?")
        files.images.unreadable += unreadable
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


def from_workers(dataset, requests, collate_fn, workers, pin_memory=False):
    """Yields collate_fn([dataset[item], ...]) for each request, a list of items, in their order.

    The workers end with this generator, whatever ends it, and within seconds of a main process that
    was killed.
    """
    loader = DataLoader(dataset, batch_sampler=requests, num_workers=workers, collate_fn=collate_fn,
                        worker_init_fn=leave_session, pin_memory=pin_memory,
                        generator=torch.Generator())  # or it would advance torch's global one
    batches = iter(loader)
    try:
        for batch in batches:
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(f"{error}; is there enough memory? Use less than --workers {workers}")
    finally:
        del batches  # the last reference to the loader's iterator: now its workers stop


# Shrink: an image folder again, with smaller pictures

JPEG_QUALITY = 95  # Pillow's advice: above it files grow and pictures hardly improve
LANCZOS = T.InterpolationMode.LANCZOS  # bicubic would change evaluation's pixels more


def smaller(file, short):
    """The bytes of a picture with its shorter side at most `short` pixels; its own bytes if it is small.

    What the loader sees is what is resized: grey, CMYK, palette and 16-bit pictures as `to_rgb` makes
    them. The format is that of the file's name: a PNG stays a PNG, and only JPEG and WebP are lossy.
    """
    content = file.read_bytes()
    picture = to_rgb(Image.open(io.BytesIO(content)))  # decodes it: a damaged small one is found too
    if min(picture.size) <= short:
        return content
    picture = T.Resize(short, LANCZOS)(picture)
    image_format = Image.registered_extensions()[file.suffix.lower()]
    written = io.BytesIO()
    if image_format in ("JPEG", "WEBP"):  # the others know no quality; a compressed TIFF refuses it
        picture.save(written, image_format, quality=JPEG_QUALITY)
    else:
        picture.save(written, image_format)
    return written.getvalue()


def write_whole(path, write, previous=None):
    """Call write(file) on a hidden file beside `path`, flush it to the disk and rename it.

    So `path` never holds half of a file. previous: the name that the file of before gets.
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


class Shrink(Dataset):
    """A picture's number -> (outcome, detail): ("done", ""), ("unreadable", file) or ("failed", why).

    An exception would come out of a worker as a page of traceback, so outcomes are returned.
    """

    def __init__(self, source, target, paths, short):
        self.source = source
        self.target = target
        self.paths = np.array(paths)
        self.short = short

    def __getitem__(self, number):
        path = str(self.paths[number])
        try:
            content = smaller(self.source / path, self.short)
        except Exception as error:  # Pillow raises half a dozen kinds for a damaged file
            return "unreadable", f"{self.source / path} ({reason(error)})"
        try:
            write_whole(self.target / path, content)
        except OSError as error:
            return "failed", f"cannot write {self.target / path} ({reason(error)})"
        return "done", ""


def list_pictures(root):
    """The pictures anywhere below a folder, as sorted paths relative to it."""
    def stop(error):
        raise SystemExit(f"cannot list {error.filename} ({reason(error)}); make it readable")

    paths = []
    for folder, _, files in os.walk(root, onerror=stop, followlinks=True):
        below = os.path.relpath(folder, root)
        for name in files:
            path = os.path.normpath(os.path.join(below, name))
            if is_picture(path):
                paths.append(path)
    return sorted(paths)


def claim_folder(source, target, short):
    """Make TO or go on in it; SystemExit where that could mix or overwrite pictures."""
    if not source.is_dir():
        raise SystemExit(f"{source} is not a folder; FROM is one with pictures in class folders")
    if source == target or source in target.parents or target in source.parents:
        raise SystemExit(f"{target} overlaps {source}; give a TO beside it, as {source}-{short}")
    if target.exists() and not target.is_dir():
        raise SystemExit(f"{target} is a file; TO is a folder, a new one or an empty one")
    record = target / ".shrink"  # hidden, as the temporary files are: no loader takes them for data
    command = f"shrink {source} --short {short}\n"
    if record.exists():
        earlier = record.read_text()
        if earlier != command:
            raise SystemExit(f"{target} holds the pictures of {earlier.strip()}; use another TO")
    elif target.exists() and any(target.iterdir()):
        raise SystemExit(f"{target} is not empty; TO is a new folder, an empty one, or one to go on in")
    else:
        try:
            write_whole(record, command.encode())
        except OSError as error:
            raise SystemExit(f"cannot write {record} ({reason(error)}); give a TO on a disk with room")


def shrink(source, target, short, workers):
    """Write every picture below `source` again below `target` -> exit code, 1 if one was unreadable."""
    source = source.expanduser().resolve()
    target = target.expanduser().resolve()
    claim_folder(source, target, short)
    show(f"listing {source}")
    paths = list_pictures(source)
    if not paths:
        raise SystemExit(f"no pictures below {source}; FROM is a folder with pictures in class folders")

    # A picture under its final name is finished; the others are read and written by the workers
    remaining = [path for path in paths if not (target / path).exists()]
    n_before = len(paths) - len(remaining)
    if n_before > 0:
        say(f"{n_before} of {len(paths)} pictures are there already")
    numbers = torch.arange(len(remaining))
    requests = [part.tolist() for part in numbers.split(8) if len(part) > 0]  # Ctrl-C waits for 8
    began = time.monotonic()
    last_line = began
    n_done = 0
    unreadable = []
    for outcomes in from_workers(Shrink(source, target, remaining, short), requests, list, workers):
        for outcome, detail in outcomes:
            if outcome == "failed":
                show("")
                raise SystemExit(f"{detail}; once that is fixed, the same command goes on")
            if outcome == "unreadable":
                unreadable.append(detail)
        n_done += len(outcomes)
        now = time.monotonic()
        speed = n_done / (now - began)
        time_left = duration((len(remaining) - n_done) / speed)
        progress = f"{n_before + n_done}/{len(paths)} pictures | {speed:.0f} img/s | {time_left} left"
        if now - last_line > 60 and not sys.stdout.isatty():  # into a file, a line a minute
            say(progress)
            last_line = now
        show(progress)

    # What could not be read is named at the end, where it is seen
    for line in unreadable:
        say(f"skipped {line}")
    n_there = len(paths) - len(unreadable)
    say(f"{n_there} of {len(paths)} pictures are in {target}, {len(unreadable)} unreadable ones skipped")
    return 1 if unreadable else 0


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare data; training itself needs none of this.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("shrink", help="write an image folder again with smaller pictures")
    p.add_argument("source", metavar="FROM", type=Path, help="folder of pictures, e.g. data/imagenet")
    p.add_argument("target", metavar="TO", type=Path, help="folder to write, new or empty")
    p.add_argument("--short", type=int, default=288, help="most pixels of a picture's shorter side")
    p.add_argument("--workers", type=int, default=n_cores(), help="processes; default: the cores")
    args = parser.parse_args(argv)
    if args.short < 32:
        parser.error(f"--short {args.short} is too small for any network; use 32 or more")
    if args.workers < 0:
        parser.error(f"--workers {args.workers} is not a number of processes; use 0 or more")
    return args


def main():
    args = get_args()
    try:
        return shrink(args.source, args.target, args.short, args.workers)
    except KeyboardInterrupt:
        show("")
        raise SystemExit("stopped; the same command goes on")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
