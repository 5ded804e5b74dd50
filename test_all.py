"""
What this project claims, in the order of its files.

$ python test_all.py  # a few minutes on two cores, no network, no data; or a part of it:
$ python -m unittest test_all.TestTrain
"""
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

import data
import evaluate
import sanity
import train
from activations import ACTIVATIONS, SmoothReLU, make_act
from attacks import STANDARD, autoattack, ball, doubts, fab, pgd, pgd_queue, uniform
from models import MEAN, MODELS, STD, attacker_view, build, in_precision, load_file, load_weights


def refuses(test, error, words, function, *args, **kwargs):
    """`function` must stop with one sentence that holds `words`."""
    with test.assertRaisesRegex(error, words) as caught:
        function(*args, **kwargs)
    test.assertNotIn("\n", str(caught.exception))
    test.assertGreater(len(str(caught.exception).split()), 5)


# activations

def softplus(x):
    return torch.logaddexp(0 * x, x)


CURVES = {  # the formula at x (float64) and alpha, and the paper's alpha
    "relu": (lambda x, a: torch.where(x > 0, x, 0), None),
    "softplus": (lambda x, a: softplus(x), None),
    "psoftplus": (lambda x, a: softplus(a * x) / a, 10.0),
    "silu": (lambda x, a: x * torch.exp(-softplus(-x)), None),
    "gelu": (lambda x, a: x * torch.erfc(-x / 2**0.5) / 2, None),
    "gelu_tanh": (lambda x, a: x * torch.exp(
        -softplus(-(8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))), None),
    "elu": (lambda x, a: torch.where(x > 0, x, a * torch.expm1(x - x.relu())), 1.0),
    "celu": (lambda x, a: torch.where(x > 0, x, a * torch.expm1((x - x.relu()) / a)), 1.0),
    "smoothrelu": (lambda x, a: x.relu() - torch.log1p(a * x.relu()) / a, 400.0),
    "mish": (lambda x, a: x * torch.tanh(softplus(x)), None)}
CASES = [(name, None) for name in CURVES] + [
    ("psoftplus", 2.5), ("elu", 0.5), ("elu", 2.0), ("celu", 0.5), ("celu", 3.0), ("smoothrelu", 1.7)]


def with_slope(function, x):
    """x -> (2, n) float64: the function's values and its slopes; it leaves x and its dtype alone."""
    seen = x.clone().requires_grad_()
    value = function(seen)
    slope, = torch.autograd.grad(value.sum(), seen)
    assert value.dtype == slope.dtype == x.dtype and torch.equal(seen, x)
    return torch.stack([value.detach(), slope]).double()


class TestActivations(unittest.TestCase):
    def test_values_and_slopes_are_the_closed_forms_in_every_precision(self):
        self.assertEqual(set(CURVES), set(ACTIVATIONS))
        wide = torch.cat([torch.linspace(-30, 30, 6000), torch.linspace(-0.1, 0.1, 2000)])
        far = torch.tensor([-1e3, -200.0, -1.0, 0.0, 1.0, 200.0, 1e3])
        for (name, alpha), (x, dtype, own, tolerance) in itertools.product(CASES, (
                (wide, torch.float64, torch.float64, 1e-12), (wide, torch.float32, torch.float32, 1e-6),
                (far, torch.bfloat16, torch.bfloat16, 0.01), (far, torch.float16, torch.float16, 0.01),
                (far, torch.float16, torch.float32, 0.01))):  # under autocast alpha stays float32
            act, (formula, default) = make_act(name, alpha).to(own), CURVES[name]
            a = act.alpha.item() if name == "smoothrelu" else alpha or default
            exact = with_slope(lambda x: formula(x, a), x.to(dtype).double())
            error = ((with_slope(act, x.to(dtype)) - exact).abs() / (1 + exact.abs())).max()
            room = 2 if name == "gelu_tanh" else 1  # torch's own: 1 - tanh² cancels
            self.assertLess(error, room * tolerance, (name, alpha, dtype))
            jump = with_slope(act.double(), torch.tensor([-1e-9, 1e-9]).double())[1].diff().abs()
            kinked = name == "relu" or name == "elu" and alpha is not None
            self.assertTrue(jump > 0.4 if kinked else jump < 1e-5, (name, alpha))

    def test_smoothrelu_learns_its_alpha_which_stays_positive(self):
        act = SmoothReLU(9.0).double()
        x = torch.tensor([-2, -0.1, 0.05, 0.3, 1, 7], dtype=torch.float64, requires_grad=True)
        run = lambda x, beta: torch.func.functional_call(act, {"beta": beta}, x)
        self.assertTrue(torch.autograd.gradcheck(run, (x, act.beta)))  # finite differences
        for beta in 20.0, 0.0, -5.0:
            act = SmoothReLU()
            act.beta.data.fill_(beta)
            act(torch.tensor([-1e3, 0.0, 1e-3, 30.0])).sum().backward()
            self.assertTrue(act.alpha > 0 and act.beta.grad.isfinite(), beta)

    def test_smooth_backward_has_relus_forward_and_a_sigmoid_as_slope(self):
        for dtype, bits in (torch.float32, torch.int32), (torch.float16, torch.int16):
            edge, kept = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, -1e-40, 6e4]), []
            x = torch.cat([torch.linspace(-30, 30, 4001), edge]).to(dtype).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                value = make_act("relu", smooth_backward=True)(x)
            value.backward(torch.full_like(x, 3))
            self.assertTrue(torch.equal(value.view(bits), F.relu(x).view(bits)))
            self.assertTrue(torch.equal(x.grad, 3 * torch.sigmoid(10 * x)))
            self.assertEqual([t.dtype for t in kept], [dtype])  # one tensor for the way back

    def test_wrong_activations_are_refused(self):
        refuses(self, SystemExit, "swish.*silu", make_act, "swish")
        refuses(self, SystemExit, "alpha", make_act, "silu", 2.0)
        refuses(self, SystemExit, "ReLU", make_act, "elu", smooth_backward=True)
        for alpha in 0.0, math.nan, math.inf:
            refuses(self, SystemExit, "not positive", make_act, "elu", alpha)


# models

def shuffled_norms(net):
    """Random BatchNorm statistics and gammas: zero gammas would hide what a branch does."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in ((m.weight, 0.5, 1.5), (m.bias, -0.2, 0.2),
                                 (m.running_mean, -0.2, 0.2), (m.running_var, 0.5, 1.5)):
                nn.init.uniform_(t, low, high)
    return net


def small(arch="resnet8", **kwargs):
    torch.manual_seed(0)
    return shuffled_norms(build(arch, num_classes=10, small_input=True, **kwargs))


def traces(net, *more):
    """All that an attack could leave behind: weights and buffers, modes, gradients, random numbers."""
    tensors = *net.state_dict().values(), torch.get_rng_state(), *more
    return ([hash(t.numpy().tobytes()) for t in tensors], [m.training for m in net.modules()],
            [(p.grad, p.requires_grad) for p in net.parameters()])


class TestModels(unittest.TestCase):
    def test_keys_shapes_and_logits_are_torchvisions(self):
        self.assertEqual((MEAN, STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        shared = set(MODELS) & set(torchvision.models.list_models())
        self.assertEqual(len(shared), 5 + 2 + 8)  # ResNets, ResNeXts, EfficientNets
        x = torch.rand(2, 3, 64, 64) * torch.tensor([1, 0.1])[:, None, None, None]
        for arch in sorted(shared):
            with torch.device("meta"):
                theirs, ours = torchvision.models.get_model(arch).eval(), build(arch)
            sizes = [[(k, t.shape) for k, t in net.state_dict().items()] for net in (ours, theirs)]
            self.assertEqual(*sizes, arch)
            if arch[-2:] not in ("b2", "b3", "b4", "b5", "b6", "b7"):
                ours = shuffled_norms(build(arch, "silu" if "eff" in arch else "relu")).eval()
                theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
                ours.load_state_dict(theirs.state_dict(), strict=True)
                with torch.no_grad():
                    a, b = ours(x), theirs(torchvision.transforms.functional.normalize(x, MEAN, STD))
                self.assertGreater((b[0] - b[1]).abs().max(), 1e-3 * b.abs().max())  # sees the image
                self.assertLess((a - b).abs().max(), 1e-5 * b.abs().max(), arch)

    def test_networks_have_the_published_size_and_an_activation_of_its_own_at_every_site(self):
        for arch, millions in (("resnet8", 0.08), ("resnet20", 0.27), ("resnext152_32x8d", 122.4),
                               ("efficientnet_l2", 480.3), ("efficientnet_l1", 272.6)):
            with torch.device("meta"):
                net = build(arch, num_classes=10 if millions < 1 else 1000)
            n = sum(p.numel() for p in net.parameters()) / 1e6
            self.assertAlmostEqual(n, millions, delta=0.05 if millions > 99 else 0.005)
        blocks, stem, head = sum(map(len, net.features[1:-1])), net.features[0][0], net.classifier[1]
        self.assertEqual((blocks, stem.out_channels, head.in_features), (63, 128, 4992))
        for arch, n_sites in ("resnet8", 7), ("resnet50", 49), ("efficientnet_b0", 49):
            own, none = (build(arch, act) for act in ("smoothrelu", "silu"))  # one alpha a site
            self.assertEqual(len([*own.parameters()]) - len([*none.parameters()]), n_sites)
            own(torch.rand(2, 3, 32, 32)).sum().backward()
            self.assertTrue(all(p.grad is not None for p in own.parameters()), arch)

    def test_the_view_shares_all_storage_also_after_steps(self):
        net = small("efficientnet_b0", act="smoothrelu", stochastic_depth=0.2).train()
        view, x = attacker_view(net), torch.rand(4, 3, 32, 32)
        F.cross_entropy(net(x), torch.arange(4)).backward()
        torch.optim.SGD(net.parameters(), 0.1).step()
        places = [[(name, t.data_ptr()) for name, t in (*tree.named_parameters(), *tree.named_buffers())]
                  for tree in (net, view)]
        self.assertEqual(*places)
        self.assertTrue(torch.equal(view(x), net.eval()(x)))

    def test_an_attack_leaves_no_trace_in_the_network_or_the_view(self):
        x, y, noise, net = torch.rand(8, 3, 32, 32), torch.arange(8), torch.zeros(8, 3, 32, 32), small()
        views = attacker_view(net), attacker_view(net, batch_stats=True)
        for view in net.eval(), *views:
            net.train(view is not net)
            before = traces(net, x, noise)
            x_adv = pgd(view, x, y, 8 / 255, 2 / 255, 3, noise)
            self.assertEqual(before, traces(net, x, noise))
            self.assertGreater(F.cross_entropy(view(x_adv), y), F.cross_entropy(view(x), y) + 0.01)
        self.assertFalse(any(p.requires_grad for v in views for p in v.parameters()))
        self.assertFalse(x_adv.requires_grad or any(m.training for v in views for m in v.modules()))
        logits = views[1](x)  # with batch statistics it is the training net, but records nothing
        self.assertEqual(before, traces(net, x, noise))
        self.assertGreater((logits - views[0](x)).abs().max(), 0.01)
        self.assertLess((logits - net(x)).abs().max(), 1e-6)

    def test_dropout_and_stochastic_depth_are_off_in_the_view(self):
        x, b0 = torch.rand(16, 3, 32, 32), "efficientnet_b0"
        for net in small(b0, dropout=0.5), small(b0, stochastic_depth=0.5), small(dropout=0.5):
            self.assertFalse(torch.equal(net.train()(x), net(x)))  # on in the training net
            self.assertTrue(torch.equal(attacker_view(net)(x), net.eval()(x)))

    def test_table_1_smooths_the_attacker_or_the_optimizer(self):
        x, y, fixed = torch.rand(8, 3, 32, 32), torch.arange(8), torch.rand(8, 3, 32, 32)
        x_adv, weights, logits = {}, {}, []
        for ours in itertools.product((False, True), repeat=2):
            net = small(smooth_backward=ours[0]).train()
            view = attacker_view(net, smooth_backward=ours[1])
            x_adv[ours] = pgd(view, x, y, 8 / 255, 8 / 255, 1, noise=torch.zeros_like(x))
            logits.append(torch.stack([view(fixed), net(fixed)]))
            F.cross_entropy(logits[-1][1], y).backward()
            torch.optim.SGD(net.parameters(), lr=0.1).step()
            weights[ours] = torch.cat([p.detach().flatten() for p in net.parameters()])
        self.assertTrue(all(torch.equal(logits[0], other) for other in logits))  # ReLU's, to the bit
        for (a, b), (c, d) in itertools.product(x_adv, repeat=2):
            self.assertEqual(torch.equal(x_adv[a, b], x_adv[c, d]), b == d)
            self.assertEqual(torch.equal(weights[a, b], weights[c, d]), a == c)

    def test_wrong_networks_and_weights_are_refused(self):
        refuses(self, SystemExit, "resnet51.*resnet50", build, "resnet51")
        refuses(self, SystemExit, "ReLU", attacker_view, small(act="silu"), smooth_backward=True)
        refuses(self, SystemExit, "EfficientNet", build, "resnet8", stochastic_depth=0.2)
        file = self.enterContext(tempfile.TemporaryDirectory()) + "/odd.pt"
        evil = type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (file + ".pwned",))})()
        for content, words in (evil, "odd.pt is damaged or"), (small().state_dict(), "differ"):
            torch.save(content, file)
            refuses(self, SystemExit, words, load_weights, build("resnet20"), file)
        self.assertFalse(os.path.exists(file + ".pwned"))


# attacks: PGD

class TestPGD(unittest.TestCase):
    """Any callable is a model; on a linear one the best attack is known, every pixel at its end."""

    def setUp(self):
        torch.manual_seed(0)
        self.x, self.y = torch.rand(6, 3, 8, 8), torch.arange(6) % 2
        self.x[:, :, 0], self.x[:, :, 1] = 0.0, 1.0
        w = torch.randint(1, 17, (192, 1)) / 128 * (torch.rand(192, 1) - 0.5).sign()
        self.w = torch.cat([-w, w], 1)
        self.up = self.w[:, 1 - self.y].T.sign().view_as(self.x)  # what raises the loss
        self.noise = torch.empty_like(self.x).uniform_(-0.05, 0.05)
        self.model = lambda x: x.flatten(1) @ self.w
        self.attack = partial(pgd, self.model, eps=0.1, step_size=0.03, steps=4)

    def test_uniform_belongs_to_the_image(self):
        every, index = uniform(3, torch.arange(500), (1, 2), (3, 4)), torch.randperm(500)
        for some in index, index[:1], index[:0]:
            self.assertTrue(torch.equal(uniform(3, some, (1, 2), (3, 4)), every[some]))
        rows = {tuple(row) for seed in (*range(5), -1, 2**62) for k in ((0, 0), (0, 1), (1, 0), (2, 1))
                for row in uniform(seed, torch.arange(50), k, (3,)).tolist()}
        self.assertEqual(len(rows), 7 * 4 * 50)  # no seed, index or counter is another one shifted
        u = uniform(0, torch.arange(200), 0, (1000,)).double()
        self.assertLess(max(abs(u.mean() - 1 / 2), abs(u.var() - 1 / 12)), 2e-3)

    def test_pgd_is_optimal_on_a_linear_model(self):
        for eps, (steps, part) in itertools.product((4 / 255, 8 / 255, 0.3), ((1, 2), (10, 1 / 4))):
            best = (self.x.double() + eps * self.up).clamp(0, 1)
            for scale in 1, 2**16:  # of the loss, for float16
                x_adv = pgd(self.model, self.x, self.y, eps, eps * part, steps, loss_scale=scale)
                self.assertLess((x_adv - best).abs().max(), 1e-7)

    def test_pgd_takes_k_signed_steps_from_its_start_and_returns_the_last(self):
        x, inner = self.x, (self.x > 0.15) & (self.x < 0.85)  # where neither box nor ball is met
        for steps in 0, 1, 4:
            x_adv = pgd(self.model, x, self.y, 0.1, 0.01, steps, self.noise)
            error = (x_adv - (x + self.noise + steps * 0.01 * self.up))[inner]
            self.assertLess(error.abs().max(), 1e-6)
        fresh = self.attack(x, self.y, steps=0) - x  # uniform in the ball
        self.assertAlmostEqual(fresh[inner].abs().mean().item(), 0.05, delta=0.005)

    def test_pgd_stays_exactly_in_the_box_and_the_ball(self):
        x = torch.cat([torch.rand(200, 3, 8, 8), torch.randint(0, 256, (200, 3, 8, 8)) / 255])
        for eps in 1 / 255, 4 / 255, 8 / 255, 0.1, 64 / 255:
            for bound, sign in zip(ball(x, eps), (-1, 1)):  # not much inside either
                self.assertLess((bound - (x.double() + sign * eps).clamp(0, 1)).abs().max(), 1e-7)
            for steps, noise in (0, torch.ones_like(x)), (0, -torch.ones_like(x)), (3, None):
                x_adv = pgd(self.model, x, torch.arange(400) % 2, eps, eps, steps, noise)
                self.assertTrue(0 <= x_adv.min() and x_adv.max() <= 1)
                self.assertLessEqual((x_adv.double() - x.double()).abs().max(), eps)  # no tolerance

    def test_arguments_that_would_make_the_attack_weak_are_refused(self):
        x, y, one = self.x, self.y, (torch.arange(6) == 2).long()
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.Dropout()).eval()
        net[2].train()  # one forgotten module is enough
        refuses(self, ValueError, "eval", pgd, net, x, y, 0.1, 0.1, 1)
        for words, odd in ("pixels", x - 0.01), ("pixels", x / 0), ("float32", x.double()):
            refuses(self, ValueError, words, self.attack, odd, y)
        for words, odd in ("labels.*2 c", y - 2 * one), ("labels.*2 c", y + 2 * one), ("int64", y.int()):
            refuses(self, ValueError, words, self.attack, x, odd)
        self.attack(x * (1 + 5e-7), y)  # rounding is no reason


# attacks: AutoAttack

EPS = 0.05


def linear(classes=10, size=4, scale=1.0):
    """A linear model of (N, 3, size, size) images, whose best L-inf attack has a closed form."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes)).eval()
    net[1].weight.data *= scale * torch.linspace(0.5, 2, classes)[:, None]  # next is not nearest
    net[1].bias.data *= scale
    return net


def images(net, n=40, size=4):
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, net(x).argmax(1)


def can_fall(net, x, y, eps=EPS):
    """Which images of a linear model have an adversarial in ball and box: tries each wrong class."""
    weight, bias = net[1].weight.detach().double(), net[1].bias.detach().double()
    lower, upper = ((x.double() + side).clamp(0, 1).flatten(1)[:, None] for side in (-eps, eps))
    slope = weight[None] - weight[y][:, None]
    best = (torch.where(slope > 0, upper, lower) * slope).sum(2) + bias[None] - bias[y][:, None]
    return best.scatter(1, y[:, None], -torch.inf).amax(1) > 0


def verdicts(net, x, y, eps=EPS, **more):
    x_adv, report = autoattack(net, x, y, eps, torch.arange(len(x)), **more)
    return torch.tensor([name is not None for name in report["fooled_by"]]), x_adv, report


class TestAutoAttack(unittest.TestCase):
    def test_each_attack_fools_exactly_the_images_of_a_linear_model_that_can_be_fooled(self):
        # cross-entropy climbs all classes at once: beyond two it may rightly end beside the best one
        for attack, classes in (("apgd-ce", 2), ("apgd-t", 10), ("fab-t", 10), ("square", 10)):
            net = linear(classes, scale=1e-3)
            x, y = images(net, 120)
            possible = can_fall(net, x, y)
            self.assertTrue(20 < possible.sum() < 100)  # the claim has both sides
            fooled, x_adv, _ = verdicts(net, x, y, attacks=(attack,), queries=1000)
            self.assertFalse((fooled & ~possible).any(), attack)
            self.assertLessEqual((fooled != possible).sum(), 1, attack)  # 1% of 120
            self.assertTrue((net(x_adv).argmax(1) != y)[fooled].all())
            self.assertTrue((x_adv[~fooled] == x[~fooled]).all())
        flipped = lambda x: net(x).flip(1)  # a search that sees falls where there are none
        fooled, _, _ = verdicts(flipped, x, y, verify=net, steps=9, queries=9)
        self.assertFalse((fooled & ~possible).any())  # verify has the last word

    def test_each_attack_fools_a_two_layer_net_wherever_brute_force_does(self):
        torch.manual_seed(3)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
        net[1].weight.data *= 3
        x, y = images(net, 100, 1)
        grid = torch.cartesian_prod(*[torch.linspace(-EPS, EPS, 21)] * 3)
        with torch.no_grad():
            everywhere = net((x.view(-1, 1, 3) + grid).clamp(0, 1).view(-1, 3, 1, 1)).view(100, -1, 4)
        possible = (everywhere.argmax(2) != y[:, None]).any(1)
        self.assertTrue(10 < possible.sum() < 90)
        for attack in STANDARD:
            fooled, _, _ = verdicts(net, x, y, attacks=(attack,), queries=500)
            self.assertLessEqual((fooled != possible).sum(), 1, attack)

    def test_every_target_class_is_tried(self):
        fixed, slope = torch.tensor([0.0, *torch.linspace(-0.1, -0.2, 8), -1]), 99 * torch.eye(10)[9]
        model = lambda x: fixed + slope * (x.mean((1, 2, 3)) - 0.5)[:, None]
        for attack in "apgd-t", "fab-t":
            x, y = torch.full((5, 3, 4, 4), 0.5), torch.zeros(5).long()
            self.assertTrue(verdicts(model, x, y, attacks=(attack,))[0].all(), attack)

    def test_fab_oversteps_the_boundary_and_comes_back(self):
        seen, w, x = [], torch.linspace(-1, 2, 48).view(3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
        edge = 0.1 * w.abs().sum()  # every pixel has to move by 0.1
        model = lambda x: (seen.append(x), torch.stack([edge, (w * (x - 0.5)).sum()])[None])[1]
        fab(model, x, torch.tensor([0]), 0.01, torch.tensor([1]), steps=4)
        place, places = 0.0, []
        for _ in range(4):
            places.append(place)  # where the slope is taken
            alpha = min(abs(1 - place) / (abs(1 - place) + 1), 0.1)
            place = (1 - alpha) * (place + 1.05 * (1 - place)) + alpha * 1.05
            places.append(place)
            place = 0.9 * place if place > 1 else place
        for x_adv, place in zip(seen, places, strict=True):
            self.assertLess((x_adv - x - 0.1 * place * w.sign()).abs().max(), 1e-5)

    def test_the_published_constants_are_the_defaults_and_every_forward_is_counted(self):
        net, calls, seen = linear(scale=1e-3), [], []
        net[1].bias.data[0] = 1e3  # nobody can fool it
        x, y = images(net, 2)
        _, _, report = verdicts(lambda x: seen.append(len(x)) or net(x), x, y,
                                progress=lambda *where: calls.append(where))
        each = {name: spent["forwards"] // 2 for name, spent in report["attacks"].items()}
        self.assertEqual(each, dict(zip(("clean", *STANDARD), (2, 101, 9 * 101, 9 * 200, 5001))))
        self.assertEqual(int(report["forwards"].sum()), sum(seen))
        self.assertEqual((calls[0], calls[-1]), (("apgd-ce", 0, 100, 2), ("square", 5000, 5000, 2)))

    def test_verdicts_do_not_depend_on_the_batch_and_leave_no_trace(self):
        torch.manual_seed(0)
        net = build("resnet8", "silu", num_classes=10, small_input=True).eval()
        nn.init.normal_(net.fc.weight, std=1.0)
        x, y = images(net, 64, 32)
        before = traces(net)
        for attack, eps, steps in (("apgd-ce", 0.15, 0), ("apgd-ce", 0.004, 9), ("square", 0.015, 0)):
            run = lambda rows: autoattack(
                net, x[rows], y[rows], eps, rows, attacks=(attack,), steps=steps,
                queries=60)[1]["forwards"]  # tells when an image fell
            parts = torch.cat([run(rows) for rows in torch.arange(64).split(7)])
            whole = run(torch.arange(64))
            self.assertTrue(5 < (whole < whole.max()).sum() < 60)
            self.assertLessEqual((whole != parts).sum(), 1)  # rounding
        self.assertEqual(before, traces(net))

    def test_masked_models_are_called_out_by_name(self):
        net = linear()
        x, _ = images(net)
        rounded = lambda x: net((20 * x).round() / 20)
        for reason, model in (("zero gradients", lambda x: 1e5 * net(x)),
                              ("zero gradients", rounded), ("masked gradients", rounded),
                              ("random logits", lambda x: net(x + 0.05 * torch.randn_like(x))),
                              ("probabilities", lambda x: net(x).softmax(1)),
                              ("not finite", lambda x: net(x) / (x[:, 0, 0, :1] > 0.5)), (None, net)):
            warnings = verdicts(model, x, model(x).argmax(1), 0.1, steps=5, queries=200)[2]["warnings"]
            named = [warning for warning in warnings if warning.startswith(f"{reason}:")]
            self.assertTrue(named if reason else not warnings, (reason, warnings))
        self.assertEqual(doubts(1000, {"square": 9}) + doubts(1000, {"apgd-ce": 9, "square": 1}), [])

    def test_ball_and_box_are_kept_exactly_in_any_layout_and_nan_is_never_returned(self):
        steep = lambda z: z - (z - z.detach()).sqrt()  # itself, with NaN for a slope
        for size, after in ((224, lambda z: z), (32, lambda z: z), (32, steep)):
            net = linear(size=size)
            x, model = images(net, 5, size)[0], lambda x: after(net(x))
            x[:2] = x[:2].round()
            wide = torch.stack([x, 1 - x], -1).flatten(3)[..., ::2]
            layouts = x, x.to(memory_format=torch.channels_last), wide, x.mT.contiguous().mT
            for x, attack in itertools.product(layouts, STANDARD):
                y = net(x).argmax(1)
                _, x_adv, _ = verdicts(model, x, y, 0.03, attacks=(attack,), steps=4, queries=20)
                self.assertTrue(((x_adv.double() - x.double()).abs() <= 0.03).all(), attack)
                self.assertTrue((x_adv >= 0).all() and (x_adv <= 1).all())  # a NaN is neither

    def test_few_classes_and_empty_batches_are_handled(self):
        for classes, words in ((2, "skipped"), (3, "ran targeted cross-entropy")):
            net = linear(classes)
            x, y = images(net)
            fooled, _, report = verdicts(net, x, y, steps=20, queries=100)
            self.assertIn(words, report["warnings"][0])
            self.assertEqual(fooled.tolist(), can_fall(net, x, y).tolist())
        self.assertEqual(verdicts(net, x[:0], y[:0])[2]["fooled_by"], [])


# data

class TestData(unittest.TestCase):
    """Image folders of 5 files a class: `good` dogs are odd kinds, `bad` dog1 and dog2 damaged."""

    @classmethod
    def setUpClass(cls):
        cls.root = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.root)
        row, column = np.mgrid[:40, :48]
        picture = Image.fromarray(np.stack([5 * column, 6 * row, 255 - 5 * column], 2).astype(np.uint8))
        odd = {"cmyk.JPEG": picture.convert("CMYK"), "grey.JPEG": picture.convert("L"),
               "palette.png": picture.convert("P"), "pixel.png": picture.crop((9, 9, 10, 10)),
               "sixteen.png": Image.fromarray((1300 * column).astype(np.uint16))}
        for folder in ("good/train/cat", "good/train/dog", "good/train/owl", "good/val/dog",
                       "good/val/owl", "bad/train/cat", "bad/train/dog"):
            (cls.root / folder).mkdir(parents=True)
            usual = {f"{folder[-3:]}{i}.JPEG": picture for i in range(5)}
            for name, image in (odd if folder == "good/train/dog" else usual).items():
                image.save(cls.root / folder / name)
        whole = (cls.root / "bad/train/dog/dog1.JPEG").read_bytes()
        (cls.root / "bad/train/dog/dog1.JPEG").write_bytes(whole[:len(whole) // 2])
        (cls.root / "bad/train/dog/dog2.JPEG").write_text("not an image")
        cls.folders = staticmethod(lambda kind="good", train=True, **kwargs:
                                   data.load("imagenet", cls.root / kind, train, 32, **kwargs))
        cls.shapes = data.load("shapes", res=16, train=False)

    def shown(self, images, members, batches):
        """The pixels of each of `members`, by their numbers; each is there once, with its label."""
        index, x, y = map(torch.cat, zip(*batches))
        self.assertEqual(index.sort().values.tolist(), list(members))
        self.assertTrue(torch.equal(y, images.y[index]))
        return x[index.argsort()]

    def test_subsets_are_prefixes_of_one_permutation_and_held_out_images_are_not_trained_on(self):
        for less, more in itertools.pairwise((0, 1, 10, 500, 999, 1000, 5000, None)):
            a, b = data.subset(1000, less).tolist(), data.subset(1000, more).tolist()
            self.assertEqual((len(a), a), (min(less, 1000), sorted(set(a) & set(b))))
        self.assertGreater(len((data.subset(50_000, 1000) // 50).unique()), 500)  # folders are sorted
        for n, limit, holdout in itertools.product((1000, 15), (None, 200, 950), (0, 50, 90, 500)):
            train, held = data.hold_out(n, limit, holdout)
            self.assertEqual(len(held), min(holdout, min(n, limit or n) // 10))
            self.assertEqual(len(train), min(limit or n, n - len(held)))
            self.assertFalse({*train.tolist()} & {*held.tolist()})

    def test_an_epoch_covers_each_member_once_in_its_own_order(self):
        members = data.subset(500, 103)
        epoch = lambda number=3, seed=0, world=1: data.epoch_batches(members, number, seed, 10, world)
        self.assertEqual(torch.cat(epoch()).sort().values.tolist(), members.tolist())
        orders = [tuple(torch.cat(e).tolist()) for e in (epoch(), epoch(), epoch(4), epoch(3, 1))]
        self.assertEqual(len(set(orders)), 3)
        for n, size, world, lengths in ((7, 128, 1, [7]), (11, 5, 1, [5, 5]), (15, 8, 2, [8, 6]),
                                        (11, 8, 2, [8]), (4, 2, 2, [2, 2])):  # never one for each
            batches = data.epoch_batches(torch.arange(n), 0, 0, size, world)
            self.assertEqual([len(batch) for batch in batches], lengths)

    def test_a_stream_that_starts_late_is_the_tail_and_moves_no_other_random_number(self):
        shapes, folders = (self.shapes, 50, 16), (self.folders(), 15, 4)
        for (images, n, size), kwargs in ((shapes, {}), (shapes, {"autoaugment": True}), (folders, {}),
                                          (folders, {"workers": 2})):
            stream = partial(data.train_batches, images, torch.arange(n), size, 3, 1, **kwargs)
            before = torch.get_rng_state()
            whole = list(stream())
            for start, steps in ((1, 2), 6), ((2, 4), 12):
                for ours, theirs in itertools.zip_longest(stream(start), whole[steps:]):
                    self.assertTrue(all(map(torch.equal, ours, theirs)))
            self.assertTrue(torch.equal(torch.get_rng_state(), before))

    def test_augmentation_belongs_to_seed_epoch_and_image_whatever_the_batch_or_process(self):
        for images, n in (self.shapes, 60), (self.folders(), 15):
            def views(size, epoch, seed, world=1):
                ranks = [data.train_batches(images, torch.arange(n), size, epoch + 1, seed, (epoch, 0),
                                            rank, world) for rank in range(world)]
                return self.shown(images, range(n), itertools.chain(*ranks))
            one, split = views(5, 0, 0), views(15, 0, 0, 3)
            self.assertTrue(torch.equal(one, split))
            for other in views(5, 1, 0), views(5, 0, 1):
                self.assertGreater((one != other).flatten(1).any(1).float().mean(), 0.9)

    def test_a_broken_image_gives_way_in_training_and_stops_evaluation(self):
        images = self.folders("bad")
        self.shown(images, sorted([*range(6), 8, 8, 8, 9] * 2),  # 8 for 6 and 7
                   data.train_batches(images, torch.arange(10), 5, 2))
        named = [Path(line.split(" (")[0]).name for line in images.broken]
        self.assertEqual(sorted(named), ["dog1.JPEG"] * 2 + ["dog2.JPEG"] * 4)
        for members, name, workers in ([0, 6, 1], "dog1", 0), ([8, 9, 7], "dog2", 1):
            batches = data.eval_batches(images, torch.tensor(members), 2, workers)
            refuses(self, SystemExit, f"{name}.JPEG", list, batches)
        refuses(self, SystemExit, "dog", list, data.train_batches(images, torch.tensor([6, 7]), 2, 1))

    def test_a_loader_process_that_dies_is_named_with_its_cause(self):
        with mock.patch("data.ignore_signals", os._exit):  # every worker's first call
            batches = data.eval_batches(self.folders(), torch.arange(15), 4, workers=1)
            refuses(self, SystemExit, "DataLoader worker.*exit.*--workers 1", list, batches)

    def test_classes_map_by_name_and_wrong_data_is_refused(self):
        val = self.folders(train=False, classes=["cat", "dog", "owl"])
        self.assertEqual([val.classes[k] for k in val.y], [Path(path).parent.name for path in val.paths])
        refuses(self, SystemExit, "dog.*cat", self.folders, train=False, classes=["cat", "owl"])
        for words, name, more in (
                ("mnist.*shapes", "mnist", {}), ("--data shapes", "imagenet", {}),
                ("--download", "cifar10", {}), ("cifar10", "shapes", {"download": True}),
                ("--res 64", "cifar10", {"res": 64}), ("--res 8", "imagenet", {"res": 8})):
            refuses(self, SystemExit, words, data.load, name, self.root, **more)


# evaluate

def quietly(main, *flags):
    """Run a script's main as its command line would -> what it printed, its exit code or sentence."""
    text, argv, evaluate.asked.signal = io.StringIO(), ["script.py", *map(str, flags)], None
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(text):
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
    return text.getvalue(), code


TINY = ("--data shapes --limit 400 --holdout 40 --epochs 3 --batch-size 16 --val-every 2 --log-every 1 "
        "--eps 2 --step-size 2 --act relu --smooth-backward both --dropout 0.1 --ema").split()


@cache
def a_run():
    """The folder of a finished run, made once: copy it, leave it as it is."""
    folder = tempfile.mkdtemp(prefix="out put é")
    unittest.addModuleCleanup(shutil.rmtree, folder)
    text, code = quietly(train.main, *TINY, "--out", folder + "/whole")
    assert code is None and "held-out clean" in text, (code, text)
    return Path(folder, "whole")


def half_robust(n=90):
    """A linear model and images of which about half fall at EPS; a ninth is wrong from the start."""
    net = linear()
    x, y = images(net, n)
    y[::9] = (y[::9] + 1) % 10
    return net, (torch.arange(n), x, y)


def run_queue(model, slots, rows=torch.arange(90), **settings):
    batches = ([t[part] for t in half_robust()[1]] for part in rows.split(20))
    settings = dict(eps=EPS, step_size=EPS / 10, steps=6) | settings
    return list(pgd_queue(model, batches, slots, **settings))


def plain_loop(model, index, x, y, eps=EPS, step_size=EPS / 10, steps=6, restarts=1, seed=0):
    """A full PGD for every restart r and step k -> fooled[r, k, i], correct[i]."""
    fooled = torch.empty(restarts, steps + 1, len(y), dtype=torch.bool)
    for r, k in itertools.product(range(restarts), range(steps + 1)):
        noise = (2 * uniform(seed, index, (0, r), x.shape[1:]) - 1) * eps
        fooled[r, k] = model(pgd(model, x, y, eps, step_size, k, noise)).argmax(1) != y
    return fooled, model(x).argmax(1) == y


def counted(fooled, correct):
    """The counts that a plain loop's verdicts make."""
    after = [int((correct & ~fooled[0, :k].any(0)).sum()) for k in range(1, fooled.shape[1] + 1)]
    robust = correct & ~fooled.flatten(0, 1).any(0)
    return {"n": len(correct), "n_correct": int(correct.sum()), "n_robust": int(robust.sum()),
            "robust_after": after}


class TestEvaluate(unittest.TestCase):
    def setUp(self):
        self.out = Path(self.enterContext(tempfile.TemporaryDirectory()), "run")

    def measure(self, *flags):
        """Evaluate a copy of a run -> its report, and what was printed."""
        if not self.out.exists():
            shutil.copytree(a_run(), self.out)
        text, code = quietly(evaluate.main, "--out", self.out, *" ".join(map(str, flags)).split(),
                             "--json", self.out / "report.json")
        self.assertIsNone(code, text)
        return json.loads((self.out / "report.json").read_text()), text

    def test_the_queue_equals_a_plain_loop_for_every_step_and_restart(self):
        net, every = half_robust()
        fooled, correct = plain_loop(net, *every, restarts=3)
        one, all_three = counted(fooled[:1], correct), counted(fooled, correct)
        self.assertGreater(one["n_robust"], all_three["n_robust"])  # else restarts could be forgotten
        self.assertGreater(one["robust_after"][0], one["robust_after"][6])
        order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
        for slots, rows in ((1, order[:40]), (7, order), (64, torch.arange(90)), (500, order)):
            lines = run_queue(net, slots, rows, restarts=3)
            counts = evaluate.tally(lines, 6)
            self.assertEqual(counts, counts | counted(fooled[:, :, rows], correct[rows]))
            for line in lines:
                first = fooled[:, :, line["index"]].nonzero().tolist()
                self.assertEqual(line["fell"], first[0] if first and correct[line["index"]] else None)
        self.assertEqual(run_queue(net, 8, order[:0]), [])
        last = evaluate.tally(run_queue(net, 16, order, last_iterate=True), 6)
        left = (~fooled[0]).sum(1).tolist()  # every image counts, what is wrong by itself too
        self.assertEqual((last["robust_after"], last["n_robust"]), (left, left[6]))

    def test_on_a_half_robust_model_the_queue_does_at_most_60_percent_of_the_work(self):
        net, seen = half_robust()[0], []
        model = lambda x: seen.append(len(x)) or net(x)
        counts = evaluate.tally(run_queue(model, 8, eps=0.07, steps=60), 60)
        self.assertTrue(30 < counts["n_robust"] < 60, counts)
        self.assertLess(sum(seen), 0.6 * 90 * 62)  # every slot counted, empty ones too

    def test_the_float32_model_has_the_last_word_and_nan_is_wrong(self):
        net, _ = half_robust()
        never = lambda x: -net(x)  # a search that sees every image fooled
        truth, found = (evaluate.tally(run_queue(model, 90, steps=0, exact=exact), 0)["n_robust"]
                        for model, exact in ((net, None), (never, net)))
        self.assertEqual(found, truth)
        self.assertEqual({line["clean"] for line in run_queue(lambda x: net(x) * math.nan, 30)}, {-1})

    def test_tf32_is_off_unless_asked_for_in_the_backward_pass_too(self):
        seen, net = [], half_robust()[0]
        look = lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
        net.register_forward_hook(look), net.register_full_backward_hook(look)
        for dtype in "fp32", "tf32", "bf16":
            device, _, _ = evaluate.open_device("cpu", dtype)
            for kind, tf32 in (dtype, dtype == "tf32"), ("fp32", False):  # the search, who confirms it
                seen.clear()
                run_queue(in_precision(net, kind, device), 90, steps=int(kind == dtype))
                self.assertEqual(set(seen), {tf32})

    def test_a_report_counts_what_a_plain_loop_counts(self):
        index, x, y = next(data.eval_batches(data.load("shapes", "", False), data.subset(1000, 40), 40))
        net = build("resnet8", num_classes=10, small_input=True)
        load_weights(net, a_run() / "model.pt")
        for flags, restarts in ("none", 2), ("attacker", 1), ("none --last-iterate", 1):
            view = attacker_view(net, smooth_backward=flags == "attacker")
            expected = plain_loop(view, index, x, y, 3 / 255, 1 / 255, 3, restarts, seed=5)
            if "last" in flags:  # every image counts, what is wrong by itself too
                expected = expected[0], torch.ones(40).bool()
            report, _ = self.measure("--limit 40 --eps 3 --step-size 1 --steps 3 --seed 5 "
                                     f"--restarts {restarts} --smooth-backward {flags}")
            right = {"n_correct": int((view(x).argmax(1) == y).sum())}
            self.assertEqual(report, report | counted(*expected) | right)
        np.testing.assert_allclose(evaluate.wilson(81, 263), (0.2553, 0.3662), atol=5e-5)  # published

        few = partial(autoattack, steps=2, queries=5)
        with mock.patch("evaluate.autoattack", few):
            report, _ = self.measure("--attack autoattack --limit 40 --eps 2 --seed 5")
        _, whole = few(attacker_view(net), x, y, 2 / 255, index, 5)
        fell = [whole["fooled_by"].count(name) for name in STANDARD]
        self.assertEqual([report["attacks"][name]["fooled"] for name in STANDARD], fell)
        self.assertEqual(report["n_robust"], int((whole["clean"] == y).sum()) - sum(fell))

    def test_an_evaluation_that_was_stopped_or_killed_goes_on_and_counts_no_image_twice(self):
        def interrupt(*where):
            if next(ticks) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            evaluate.stop_if_asked()

        for kind, flags in ("pgd", "--steps 3"), ("apgd", "--attack apgd --eps 1"):
            ticks = itertools.count()
            with mock.patch("evaluate.autoattack", partial(autoattack, steps=3)):
                report, _ = self.measure("--limit 40 --batch-size 7", flags)
                ledger = next((self.out / "eval").glob(f"{kind}-*.0.jsonl"))
                lines = ledger.read_text().splitlines(keepends=True)
                ledger.write_text("".join(lines[:7]) + lines[7][:9])  # killed in the middle
                ledger.with_name(ledger.name.replace(".0.", ".5.")).write_text("".join(lines[7:9]))
                with mock.patch("evaluate.progress", interrupt):
                    self.assertRaisesRegex(AssertionError, "75", self.measure, "--limit 40", flags)
                again, _ = self.measure("--limit 40", flags)
            self.assertEqual(sorted(lines[:7] + lines[9:]), sorted(ledger.read_text().splitlines(True)))
            self.assertEqual(again | dict(seconds=0, attacks=0), report | dict(seconds=0, attacks=0))
        self.assertEqual(self.measure("--limit 40", flags)[0], again)  # finished: again, seconds and all
        self.assertNotIn("going on", self.measure("--limit 9", flags, "--steps 3 --fresh")[1])

    def test_bad_input_gets_one_sentence(self):
        net = "--weights x.pt --data shapes --arch "
        for flags, word in (
                ("--out nowhere", "nowhere"), ("--weights x.pt", "--arch"), ("--eps -1", "--eps"),
                (net + "resnet8 --act relu", "x.pt"), (net + "resnet9 --act relu", "resnet9"),
                (net + "resnet8 --act rely", "rely"), ("--step-size 0", "--step-size"),
                ("--restarts 0", "--restarts"), ("--restarts 2 --last-iterate", "--restarts"),
                ("--limit 0", "--limit"), ("--smooth-backward attacker --act silu", "ReLU")):
            folder = () if "x.pt" in flags or "out" in flags else ("--out", a_run())
            self.assertRegex(str(quietly(evaluate.main, *folder, *flags.split())[1]), rf"\A.*{word}.*\Z")


# train

def log_of(folder, kind):
    """The lines of one kind in log.jsonl."""
    return [line for line in map(json.loads, (folder / "log.jsonl").open()) if line["kind"] == kind]


class TestTrain(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="out put é")))

    def test_recipes_and_schedules_are_the_papers(self):
        for flags, recipe in (
                ("", dict(data="imagenet", arch="resnet50", act="silu", epochs=100, wd=1e-4, eps=4,
                          steps=1, step_size=4, res=224, label_smoothing=0, nesterov=False, dropout=0)),
                ("--arch efficientnet_l1 --enhanced --no-ema", dict(  # Sec. 5.2
                    wd=1e-5, epochs=200, dropout=0.5, stochastic_depth=0.2, res=600, autoaugment=True,
                    early_stop=True, ema=False))):
            args = vars(train.get_args(flags.split()))
            self.assertEqual(args, args | recipe)
        for flags, rates in (
                ("", {0: 8e-5, 2.5: 0.20008, 5: 0.4, 29: 0.4, 30: 0.04, 60: 0.004, 90: 0.0004}),
                ("--epochs 200", {59.9: 0.4, 60: 0.04}),
                ("--data cifar10", {6: 0.1, 12: 0.2, 21: 0.1, 30: 0})):  # one cycle
            for epoch, lr in rates.items():
                self.assertAlmostEqual(train.lr_at(train.get_args(flags.split()), epoch, 0, 1000), lr, 4)

    def test_flags_smooth_normalise_and_decay_what_they_name(self):
        for who, bn in itertools.product(("none", "attacker", "optimizer", "both"), ("eval", "batch")):
            args = f"--data shapes --act relu --smooth-backward {who} --attack-bn {bn}".split()
            run = train.assemble(train.get_args(args), torch.device("cpu"), 0, 1, 10)
            self.assertEqual(run.view.act.smooth_backward, who in ("attacker", "both"))
            self.assertEqual(run.net.act.smooth_backward, who in ("optimizer", "both"))
            self.assertEqual(run.view.bn1.running_mean is None, bn == "batch")
        groups = train.parameter_groups(build("efficientnet_b0", "smoothrelu"), 1e-4)
        for group, decay, dims in zip(groups, (1e-4, 0), ({2, 4}, {0, 1})):  # 0: SmoothReLU's alpha
            self.assertEqual((group["weight_decay"], {p.ndim for p in group["params"]}), (decay, dims))

    def test_training_noise_belongs_to_seed_epoch_and_image(self):
        net, index = attacker_view(small(act="silu")), torch.arange(6)
        x, y = uniform(0, index, 9, (3, 32, 32)), torch.zeros(6, dtype=torch.long)
        attack = lambda flags="", epoch=0, rows=index: train.attack(
            train.get_args(["--data", "shapes", *flags.split()]), net, x[rows], y[rows], rows, epoch)
        some, noise = torch.tensor([4, 1]), (2 * uniform(0, index, (2, 0), (3, 32, 32)) - 1) * 3 / 255
        self.assertLess((attack()[some] - attack(rows=some)).abs().max(), 1e-6)
        for other in attack(epoch=1), attack("--seed 1"):
            self.assertGreater((attack() - other).abs().mean(), 1e-3)
        for flags, expected in (
                ("--steps 0", x), ("--step-size 1e-9 --clean-start 1", x),
                ("--eps 3 --step-size 2 --steps 5", pgd(net, x, y, 3 / 255, 2 / 255, 5, noise))):
            self.assertLess((attack(flags) - expected).abs().max(), 1e-6)

    def test_parts_of_a_batch_add_up_and_steps_that_fp16_skips_are_counted(self):
        weights, index = [], torch.arange(10)
        x = uniform(0, index, 0, (3, 2, 2))
        for accum, dtype in (1, "fp32"), (2, "fp32"), (5, "fp32"), (1, "fp16"):
            args = train.get_args(f"--data shapes --steps 0 --accum {accum} --dtype {dtype}".split())
            run = train.assemble(args, torch.device("cpu"), 0, 1, 10)
            torch.manual_seed(0)
            run.net = run.trainee = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
            run.optimizer, w = torch.optim.SGD(run.net.parameters(), 1.0), run.net[1].weight
            if dtype == "fp16":
                before = w.detach().clone()
                train.train_step(run, index, x * math.inf, index, False)
                self.assertTrue(torch.equal(w, before) and (run.skipped, run.sums[3]) == (1, 1))
            train.train_step(run, index, x, index, False)
            weights.append(w.detach())
        for other, room in zip(weights[1:], (1e-6, 1e-6, 1e-2)):
            self.assertLess((weights[0] - other).abs().max(), room)

    def test_bad_flags_get_one_sentence_and_touch_nothing(self):
        for flags, word in (
                ("--eps -1", "--eps"), ("--step-size 0", "--step-size"), ("--steps -1", "--steps"),
                ("--smooth-backward both --act silu", "relu"), ("--res 8", "--res"), ("--lr 0", "--lr"),
                ("--smooth-backward attacker --act silu", "relu"), ("--limit 1", "--limit"),
                ("--batch-size 10 --accum 3", "9 or 12"), ("--clean-start 2", "--clean-start"),
                ("--stochastic-depth 0.2", "Effic"), ("--val-every 0", "val"), ("--device tpu", "tpu"),
                ("--data-dir nowhere --data imagenet", "nowhere"), ("--act-alpha 2", "alpha"),
                ("--early-stop --holdout 0", "--holdout")):
            out = self.folder / "none"
            _, code = quietly(train.main, "--data", "shapes", "--out", out, *flags.split())
            self.assertRegex(str(code), rf"\A.*{word}.*\Z")
            self.assertFalse((out / "args.json").exists())

    def test_a_run_logs_its_schedule_and_keeps_the_average_which_is_as_good_as_the_weights(self):
        run, args = a_run(), train.get_args(TINY)
        steps, epochs, vals = (log_of(run, kind) for kind in ("step", "epoch", "val"))
        rates = [train.lr_at(args, epoch, step, 25) for epoch in range(3) for step in range(25)]
        np.testing.assert_allclose([s["lr"] for s in steps], rates)
        means = np.reshape([s["loss"] for s in steps], (3, 25)).mean(1)
        np.testing.assert_allclose([epoch["loss"] for epoch in epochs], means, 1e-5)
        self.assertEqual([(val["epoch"], val["n"]) for val in vals], [(2, 40), (3, 40)])
        self.assertGreater(vals[-1]["robust"], max(0.15, vals[-1]["raw_robust"] - 0.15))  # chance: 0.1
        ema, kept = load_file(run / "last.pt")["ema"], load_file(run / "model.pt")
        self.assertTrue(all(torch.equal(ema[f"module.{name}"], t) for name, t in kept.items()))

    def test_a_run_is_not_overwritten_and_survives_a_damaged_checkpoint(self):
        out = shutil.copytree(a_run(), self.folder / "run")
        contents = lambda: {path.name: path.read_bytes() for path in out.iterdir()}
        before, again = contents(), lambda *flags: quietly(train.main, *TINY, "--out", out, *flags)
        self.assertEqual(set(before), {
            "args.json", "log.txt", "log.jsonl", "model.pt", "best.pt", "last.pt", "last.prev.pt"})
        self.assertIn("--resume", again()[1])
        self.assertRegex(again("--resume", "--wd", 4, "--log-every", 5)[1], "has --wd [^,]*; use")
        self.assertEqual(before, contents())
        self.assertRegex(again("--resume")[0], "finished")

        raw = bytearray(before["last.pt"])
        raw[len(raw) // 2] ^= 1
        (out / "last.pt").write_bytes(raw)
        self.assertRegex(again("--resume")[0], "(?s)last.prev.pt.*going on at epoch 3, step.*finished")
        for name in "last.pt", "last.prev.pt":
            (out / name).write_bytes(b"")
        self.assertIn("damaged", again("--resume")[1])

    def test_nan_stops_the_run_and_is_never_saved(self):
        def poisoned(run, *batch):
            if (run.epoch, run.step) == (1, 4):
                run.net.fc.bias.data[0] = math.nan
            return step(run, *batch)

        step = train.train_step
        with mock.patch.object(train, "train_step", poisoned):
            _, code = quietly(train.main, *TINY, "--out", self.folder, "--resume")
        self.assertRegex(code, "epoch 2, step 5.*last.pt")
        state = load_file(self.folder / "last.pt")
        self.assertTrue(state["epoch"] == 1 and all(t.isfinite().all() for t in state["model"].values()))

    def test_a_collapse_of_robustness_ends_the_run_and_keeps_the_best_weights(self):
        robust = iter([12, 20, 13, 30])
        counts = lambda *_: {"n": 30, "n_correct": 25, "n_robust": next(robust)}
        flags = "--no-ema --early-stop --epochs 9 --val-every 1 --limit 64".split()
        with mock.patch.object(train, "validate", counts):
            text, code = quietly(train.main, *TINY, *flags, "--out", self.folder, "--resume")
        self.assertTrue(code is None and "catastrophic overfitting" in text, text)
        state = load_file(self.folder / "last.pt")
        self.assertEqual((state["epoch"], state["best_epoch"]), (3, 2))
        best, kept = (load_file(self.folder / name)["fc.weight"] for name in ("best.pt", "model.pt"))
        self.assertTrue(torch.equal(best, kept) and not torch.equal(best, state["model"]["fc.weight"]))

    def test_a_killed_and_a_stopped_run_end_with_the_weights_of_one_that_was_neither(self):
        out, step = self.folder / "killed", train.train_step
        command = [sys.executable, "train.py", *TINY, "--out", str(out), "--save-every", "0.005"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not (out / "last.pt").exists() or len(log_of(out, "step")) < 8:
            time.sleep(0.02)
        process.kill()
        process.wait()

        def stopped(run, *batch):
            if (run.epoch, run.step) == (2, 5):
                os.kill(os.getpid(), signal.SIGTERM)
            return step(run, *batch)

        with mock.patch.object(train, "train_step", stopped):
            text, code = quietly(train.main, *TINY, "--out", out, "--resume")
        self.assertRegex(text, r"going on at epoch \d, step \d")  # not from the start
        self.assertTrue(code == 75 and "stopped at epoch 3, step 6" in text, text)
        self.assertRegex(quietly(train.main, *TINY, "--out", out, "--resume")[0], "epoch 3, step 6")
        whole, ours = (load_file(folder / "last.pt") for folder in (a_run(), out))
        for part in "model", "ema":
            self.assertTrue(all(torch.equal(t, ours[part][name]) for name, t in whole[part].items()))
        self.assertEqual(log_of(a_run(), "val"), log_of(out, "val"))
        self.assertEqual(*([line["loss"] for line in log_of(f, "epoch")] for f in (a_run(), out)))

    def test_two_processes_share_one_network_and_count_each_image_once(self):
        out, report = self.folder / "two", self.folder / "one.json"
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
        flags = [*TINY, "--limit", "80", "--accum", "2", "--out", str(out)]
        done = subprocess.run([sys.executable, *torchrun, "test_all.py", "two-ranks", *flags],
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        two, names = json.loads((out / "two.json").read_text()), ("n", "n_correct", "robust_after")
        for fresh in (), ("--fresh",):  # one process reads the ledgers of both, or measures by itself
            flags_41 = "--out", out, "--limit", 41, "--steps", 4, "--json", report, *fresh
            text, _ = quietly(evaluate.main, *flags_41)
            one = json.loads(report.read_text())
            self.assertEqual("going on from 41 lines" in text, not fresh)
            self.assertEqual([one[name] for name in names], [two[name] for name in names])
        self.assertEqual((two["processes"], two["n"]), (2, 41))
        self.assertEqual({val["n"] for val in log_of(out, "val")}, {8})  # a tenth of 80
        self.assertRegex(quietly(train.main, *flags, "--resume")[0], "1 processes instead of 2: not bit")


def two_ranks():
    """Each rank of the test above: trains, with a check after each step, then evaluates."""
    step, flags = train.train_step, sys.argv[2:]

    def checked(run, *batch):
        share = step(run, *batch)
        mine = torch.cat([t.flatten().double() for t in run.view.state_dict().values()])
        most = mine.clone()
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        assert torch.equal(mine, most), "weights or BatchNorm's statistics differ between the ranks"
        assert len(batch[0]) * 2 == run.args.batch_size
        return share

    keep, out = torch.distributed.destroy_process_group, flags[flags.index("--out") + 1]
    train.train_step, torch.distributed.destroy_process_group = checked, lambda: None
    sys.argv = ["train.py", *flags]
    train.main()
    sys.argv = ["evaluate.py", "--out", out, *"--limit 41 --steps 4 --json".split(), out + "/two.json"]
    evaluate.main()
    keep()


# sanity

class Straight(nn.Module):
    """The class is the sign of (mean of the pixels - 1/2): a known robustness, with room for masks."""

    def __init__(self, slope=100.0, before=lambda x: x, after=lambda z: z, bend=lambda m: m):
        super().__init__()
        self.slope, self.before, self.after, self.bend = slope, before, after, bend
        self.eval()

    def forward(self, x):
        z = self.slope * self.bend(self.before(x).mean((1, 2, 3)) - 0.5)
        return self.after(torch.stack((-z, z, -z.abs() - 1, -z.abs() - 2), 1))


def toy_images(low=0.01, high=0.09, n=150):
    """Labels by turns; the mean of the pixels is `low` to `high` from 1/2."""
    index, y = torch.arange(n), torch.arange(n) % 2
    x = uniform(5, index, 0, (3, 8, 8))
    far = torch.linspace(low, high, n) * (2 * y - 1) - 0.4 * x.mean((1, 2, 3))
    return index, 0.5 + 0.4 * x + far[:, None, None, None], y


class TestSanity(unittest.TestCase):
    def verdicts(self, net, *caught, images=toy_images(), **others):
        """The verdicts on a net; those of the doubts `caught` have to be bad, and one of all a FAIL."""
        doubts = sanity.doubts(net, *images, eps=8, step_size=2, **others)
        seen = {doubt["what"]: doubt["verdict"] for doubt in doubts}
        for name in caught:
            self.assertIn(seen[name], ("WARN", "FAIL"), f"{name}: {seen}")
        self.assertEqual("FAIL" in seen.values(), bool(caught), seen)
        return set(seen.values())

    def test_a_robust_net_passes_every_doubt_and_one_without_a_margin_does_not(self):
        self.assertEqual(self.verdicts(Straight(), surrogate=Straight(50.0)), {"PASS", "SKIP"})
        self.verdicts(Straight(), "a normal net stands", normal=Straight())
        self.verdicts(Straight(), "robust", images=toy_images(0.001, 0.02))

    def test_masks_and_overfitting_are_caught_by_the_doubts_that_should(self):
        blind = ("zeros in the input gradient", "robust at eps 64", "fooled by steps 1 to 200",
                 "left, by APGD too; Square fools", "loss rises towards the attack")
        self.verdicts(Straight(1e7), *blind)
        self.verdicts(Straight(before=lambda x: (64 * x).round() / 64), *blind)  # its slope is 0
        random = torch.Generator().manual_seed(0)
        noisy = Straight(after=lambda z: z + 2 * torch.randn(z.shape, generator=random))
        self.verdicts(noisy, "two calls differ", "loss rises towards the attack")
        self.verdicts(Straight(after=lambda z: z.softmax(1)), "outputs that are no logits")
        # Wrong only on the way: at a quarter of eps, not at the three quarters where PGD-1 lands
        trench = Straight(bend=lambda m: m * (1 - 3 * torch.exp(-((m.abs() - 0.038) / 0.006) ** 2)))
        self.verdicts(trench, "robust to PGD-1, and to PGD-50", images=toy_images(0.049, 0.051))


# README

class TestReadme(unittest.TestCase):
    text = Path(__file__).with_name("README.md").read_text()

    def test_every_command_is_understood_by_its_script(self):
        commands = [
            found for line in re.findall(r"`([^`\n]+)`", self.text) + self.text.splitlines()
            for found in re.findall(r"(?:python|run|\d) (train|evaluate|sanity)\.py([^`|&#\n]*)", line)
            if re.match(r" *(\.?venv|python|torchrun)", line) and "--help" not in line]
        self.assertGreater(len(commands), 120)
        for script, flags in commands:
            args = globals()[script].get_args(flags.split())
            if script == "train":
                train.check(args, 8 if args.data == "imagenet" else 1)
                with torch.device("meta"):
                    train.network(args, 10)

    def test_every_row_of_the_paper_has_its_command(self):
        runs = set(re.findall(r"train\.py (--.*?)(?: --out|`|$)", self.text, re.MULTILINE))
        wide = "arch resnet152", "arch resnext50_32x8d", "res 380", "arch resnext152_32x8d --res 380"
        acts = "relu", "psoftplus", "silu", "gelu", "elu", "smoothrelu", "softplus"  # Fig. 3, Sec. 7
        rows = {f"{data}--act {act}" for act in acts for data in ("", "--data cifar10 ")}
        rows |= {f"--act relu --{flags}" for flags in (  # Table 1, Secs. 3.2 and 3.3
            "smooth-backward attacker", "smooth-backward optimizer", "smooth-backward both", "steps 0",
            "steps 0 --smooth-backward optimizer", "steps 2", "epochs 200")}
        rows |= {f"--act {act} --act-alpha {alpha / 10}" for act in ("elu", "celu")
                 for alpha in (12, 14, 16, 18, 20)}  # Table 2
        rows |= {f"--{size} --act {act}" for size in wide for act in ("silu", "relu")}  # Sec. 5.1
        rows |= {f"--{s} --act silu" for s in ("arch resnet101", "arch resnext50_32x4d", "res 299")}
        rows |= {f"--arch efficientnet_{size}" for size in (  # Fig. 4, Sec. 5.2
            *(f"b{k}" for k in range(8)), "l1", "l1 --enhanced", "l1 --enhanced --steps 0")}
        self.assertEqual(rows - runs, set())
        for part in ("sanity.py activations", "sanity.py landscape", "sanity.py cost", "--eps 8",
                     "--eps 16", "--steps 1 --step-size 4 --smooth-backward attacker"):
            self.assertIn(part, self.text)


if __name__ == "__main__":
    two_ranks() if sys.argv[1:2] == ["two-ranks"] else unittest.main(warnings="ignore")
