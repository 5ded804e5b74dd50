"""
What this project claims, in the order of its files.

$ python test_all.py                       # minutes on two cores; no network, no data needed
$ python -m unittest test_all.TestTrain    # a part of it
Tests on CIFAR-10 look for data/cifar-10-batches-py and say "skipped" where it is not.
"""
import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.resnet import Bottleneck, ResNet

import data
import evaluate
import sanity
import train
from activations import ACTIVATIONS, SmoothReLU, make_act
from attacks import (STANDARD, autoattack, ball, doubts, input_gradient, mix, pgd, pgd_queue, targeted_dlr,
                     to_hyperplane, uniform)
from models import MEAN, MODELS, STD, attacker_view, averaged, build, load_file, load_weights

def refuses(test, error, words, function, *args, **kwargs):
    """`function` must stop with one sentence that holds `words`."""
    with test.assertRaisesRegex(error, words) as caught:
        function(*args, **kwargs)
    test.assertNotIn("\n", str(caught.exception))
    test.assertGreater(len(str(caught.exception).split()), 5)


# activations

def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def gelu(x, a):
    cdf = np.vectorize(math.erfc)(-x / 2**0.5) / 2
    return x * cdf, cdf + x * np.exp(-x**2 / 2) / (2 * np.pi) ** 0.5


def gelu_tanh(x, a):
    t, c = np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)), (2 / np.pi) ** 0.5
    return x * (1 + t) / 2, (1 + t) / 2 + x / 2 * (1 - t**2) * c * (1 + 3 * 0.044715 * x**2)


def mish(x, a):
    t = np.tanh(np.logaddexp(0, x))
    return x * t, t + x * (1 - t**2) * sigmoid(x)


def elu(x, a, scale):
    n = np.minimum(x, 0) / scale
    return np.where(x > 0, x, a * np.expm1(n)), np.where(x > 0, 1, a / scale * np.exp(n))


def smoothrelu(x, a):
    r = np.maximum(x, 0)
    return r - np.log1p(a * r) / a, a * r / (1 + a * r)


CURVES = {  # x, alpha -> value, first derivative
    "relu": lambda x, a: (np.maximum(x, 0), (x > 0) * 1.0),
    "softplus": lambda x, a: (np.logaddexp(0, x), sigmoid(x)),
    "psoftplus": lambda x, a: (np.logaddexp(0, a * x) / a, sigmoid(a * x)),
    "silu": lambda x, a: (x * sigmoid(x), sigmoid(x) * (1 + x * sigmoid(-x))),
    "gelu": gelu, "gelu_tanh": gelu_tanh, "mish": mish, "smoothrelu": smoothrelu,
    "elu": lambda x, a: elu(x, a, 1), "celu": lambda x, a: elu(x, a, a)}
CASES = [(name, None) for name in CURVES] + [
    ("psoftplus", 2.5), ("elu", 0.5), ("elu", 2.0), ("celu", 0.5), ("celu", 3.0), ("smoothrelu", 1.7)]


def worst_error(act, name, alpha, x):
    """The curve's and its slope's distance from the closed form, over 1 + |closed form|."""
    alpha = alpha or {"psoftplus": 10.0, "elu": 1.0, "celu": 1.0, "smoothrelu": 400.0}.get(name)
    if name == "smoothrelu":
        alpha = act.alpha.item()
    x = x.clone().requires_grad_()
    value = act(x)
    value.sum().backward()
    assert value.dtype == x.dtype and all(p.grad.isfinite() for p in act.parameters())
    exact = torch.from_numpy(np.stack(CURVES[name](x.detach().double().numpy(), alpha)))
    return ((torch.stack([value.detach(), x.grad]).double() - exact).abs() / (1 + exact.abs())).max()


class TestActivations(unittest.TestCase):
    def test_values_and_slopes_are_the_closed_forms(self):
        self.assertEqual(set(CURVES), set(ACTIVATIONS))
        for dtype, tolerance in (torch.float64, 1e-12), (torch.float32, 1e-6):
            x = torch.cat([torch.linspace(-30, 30, 6000), torch.linspace(-0.1, 0.1, 2000)]).to(dtype)
            for name, alpha in CASES:
                room = 2 if name == "gelu_tanh" else 1  # torch's own: 1 - tanh² cancels
                error = worst_error(make_act(name, alpha).to(dtype), name, alpha, x)
                self.assertLess(error, room * tolerance, (name, alpha, dtype))

    def test_half_precision_is_right_at_a_thousand(self):
        for dtype, (name, alpha) in itertools.product((torch.bfloat16, torch.float16), CASES):
            x = torch.tensor([-1e3, -200.0, -1.0, 0.0, 1.0, 200.0, 1e3]).to(dtype)
            for act in make_act(name, alpha), make_act(name, alpha).to(dtype):  # autocast; all in half
                self.assertLess(worst_error(act, name, alpha, x), 0.01, (name, alpha, dtype))

    def test_the_slope_jumps_at_zero_for_relu_and_for_elu_with_another_alpha_only(self):
        for name, alpha in CASES:
            x = torch.tensor([-1e-9, 1e-9], dtype=torch.float64, requires_grad=True)
            make_act(name, alpha).double()(x).sum().backward()
            jumps = name == "relu" or name == "elu" and alpha is not None
            compare, bound = (self.assertGreater, 0.4) if jumps else (self.assertLess, 1e-5)
            compare(x.grad.diff().abs(), bound, (name, alpha))

    def test_smoothrelu_learns_its_alpha_which_stays_positive(self):
        act = SmoothReLU(9.0).double()
        self.assertAlmostEqual(act.alpha.item(), 9, delta=2e-3)
        self.assertAlmostEqual(make_act("smoothrelu").alpha.item(), 400, delta=2e-3)
        x = torch.tensor([-2, -0.1, 0.05, 0.3, 1, 7], dtype=torch.float64, requires_grad=True)
        run = lambda x, beta: torch.func.functional_call(act, {"beta": beta}, x)
        self.assertTrue(torch.autograd.gradcheck(run, (x, act.beta)))  # finite differences
        for beta in 20.0, 1e-30, 0.0, -5.0:
            act = SmoothReLU()
            act.beta.data.fill_(beta)
            value = act(torch.tensor([-30.0, 0.0, 1e-3, 30.0]))
            value.sum().backward()
            self.assertGreater(act.alpha.item(), 0)
            self.assertTrue(value.isfinite().all() and act.beta.grad.isfinite(), beta)

    def test_smoothrelu_computes_the_gradient_of_alpha_only_when_asked(self):
        for asked in False, True:
            act = SmoothReLU()
            act.beta.requires_grad_(asked)
            value = act(torch.randn(9, requires_grad=True)).sum()
            with mock.patch("torch.log1p", side_effect=ArithmeticError):  # alpha's slope has a log
                self.assertRaises(ArithmeticError, value.backward) if asked else value.backward()

    def test_smooth_backward_has_relus_forward_and_a_sigmoid_as_slope(self):
        for dtype, bits in (torch.float32, torch.int32), (torch.float16, torch.int16):
            edge = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40, -1e-40, 6e4])
            x = torch.cat([torch.linspace(-30, 30, 4001), edge]).to(dtype).requires_grad_()
            value = make_act("relu", smooth_backward=True)(x)
            value.backward(torch.full_like(x, 3))
            self.assertTrue(torch.equal(value.view(bits), F.relu(x).view(bits)))
            self.assertTrue(torch.equal(x.grad, 3 * torch.sigmoid(10 * x)))

    def test_our_curves_keep_one_tensor_for_the_backward_pass(self):
        for name, dtype in itertools.product(("relu", "smoothrelu"), (torch.float32, torch.float16)):
            kept, x = [], torch.randn(1000).to(dtype).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
                make_act(name, smooth_backward=name == "relu")(x)
            self.assertEqual([t.dtype for t in kept if t.numel() > 1], [dtype], name)

    def test_each_call_makes_a_fresh_module_that_never_works_in_place(self):
        for name in ACTIVATIONS:
            first, second, x = make_act(name), make_act(name), torch.randn(100)
            before = x.clone()
            first(x)
            self.assertTrue(first is not second and torch.equal(x, before), name)
            self.assertFalse({*map(id, first.parameters())} & {*map(id, second.parameters())})

    def test_wrong_activations_are_refused(self):
        refuses(self, SystemExit, "swish.*silu", make_act, "swish")
        refuses(self, SystemExit, "alpha", make_act, "silu", 2.0)
        for alpha in 0.0, -1.0, math.nan, math.inf:
            refuses(self, SystemExit, "not positive", make_act, "elu", alpha)
        for name in set(ACTIVATIONS) - {"relu"}:
            refuses(self, SystemExit, "ReLU", make_act, name, smooth_backward=True)


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


def theirs(arch):
    """The same network by torchvision, on the meta device, from parts if it has no name for it."""
    with torch.device("meta"):
        if arch in ("resnext50_32x8d", "resnext152_32x8d"):
            depths = [3, 4, 6, 3] if "50" in arch else [3, 8, 36, 3]
            return ResNet(Bottleneck, depths, groups=32, width_per_group=8).eval()
        if arch in ("efficientnet_l1", "efficientnet_l2"):
            width, depth = (3.9, 3.7) if "l1" in arch else (4.3, 5.3)
            stages = ((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2),
                      (6, 3, 2, 40, 80, 3), (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4),
                      (6, 3, 1, 192, 320, 1))
            return EfficientNet([MBConvConfig(*stage, width, depth) for stage in stages], 0.5)
        return torchvision.models.get_model(arch).eval()


def digest(t):
    """Equal for equal tensors, and short: unittest takes minutes to show how two long lists differ."""
    return hash(t.numpy().tobytes())


def traces(net):
    """All that an attack could leave behind: weights and buffers, modes, gradients."""
    return ([(name, digest(t)) for name, t in net.state_dict().items()], [m.training for m in net.modules()],
            [(p.grad, p.requires_grad) for p in net.parameters()])


class TestModels(unittest.TestCase):
    def assert_same_logits(self, arch, **kwargs):
        ours, other = shuffled_norms(build(arch, **kwargs)).eval(), theirs(arch)
        x = torch.rand(2, 3, 64, 64)
        other.load_state_dict(ours.state_dict(), strict=True, assign=True)
        ours.load_state_dict(other.state_dict(), strict=True)
        with torch.no_grad():
            a, b = ours(x), other(torchvision.transforms.functional.normalize(x, MEAN, STD))
        self.assertGreater((b[0] - b[1]).abs().max(), 1e-3 * b.abs().max(), arch)  # it sees the image
        self.assertLess((a - b).abs().max(), 1e-5 * b.abs().max(), arch)

    def test_resnets_are_torchvisions(self):
        self.assertEqual((MEAN, STD), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        for arch in MODELS:
            if arch.startswith("resne") and arch not in ("resnet8", "resnet20"):
                self.assert_same_logits(arch)

    def test_efficientnets_are_torchvisions(self):
        for arch in "efficientnet_b0", "efficientnet_b1":
            self.assert_same_logits(arch, act="silu")
        self.assert_same_logits("efficientnet_b5", act="silu", bn_eps=1e-3, bn_momentum=0.01)
        for arch in (arch for arch in MODELS if arch.startswith("efficientnet")):
            with torch.device("meta"):
                sizes = [[(name, t.shape) for name, t in net.state_dict().items()]
                         for net in (build(arch, act="silu"), theirs(arch))]
            self.assertEqual(*sizes, arch)

    def test_networks_have_the_published_size(self):
        sizes = {"resnet8": "0.08", "resnet20": "0.27", "resnext50_32x8d": "48.02",
                 "resnext152_32x8d": "122.4", "efficientnet_l1": "272.6", "efficientnet_l2": "480.3"}
        for arch, millions in sizes.items():
            with torch.device("meta"):
                net = build(arch, num_classes=10 if millions < "1" else 1000)
            n = sum(p.numel() for p in net.parameters()) / 1e6
            self.assertEqual(f"{n:.{len(millions.split('.')[1])}f}", millions, arch)
            if arch == "efficientnet_l1":
                self.assertEqual(sum(len(stage) for stage in net.features[1:-1]), 63)
                self.assertEqual(net.features[0][0].out_channels, 128)  # stem and head
                self.assertEqual(net.classifier[1].in_features, 4992)

    def test_every_site_has_its_own_activation_and_uses_it_once(self):
        for arch, n_sites in ("resnet8", 7), ("resnet50", 49), ("efficientnet_b0", 49):
            net, calls = build(arch, act="smoothrelu", num_classes=10).eval(), []
            for m in net.modules():
                if isinstance(m, SmoothReLU):
                    m.register_forward_hook(lambda m, *_: calls.append(m.beta.data_ptr()))
            net(torch.rand(1, 3, 32, 32))
            self.assertEqual((len(calls), len(set(calls))), (n_sites, n_sites), arch)
            self.assertEqual(sum(isinstance(m, SmoothReLU) for m in net.modules()), n_sites)

    def test_the_small_stem_keeps_the_resolution(self):
        for arch, size in ("resnet20", 8), ("resnet18", 8), ("efficientnet_b0", 16):
            for small_input in True, False:
                net, seen = build(arch, num_classes=10, small_input=small_input).eval(), []
                first = net.layer1 if "resnet" in arch else net.features[1]
                first.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].shape[-1]))
                net(torch.rand(1, 3, 32, 32))
                self.assertEqual(seen, [32 if small_input else size], arch)

    def test_weights_travel_through_a_float32_file(self):
        net, x, file = small().eval(), torch.rand(2, 3, 32, 32), io.BytesIO()
        torch.save(net.state_dict(), file)
        weights = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        for dtype, tolerance in (torch.float32, 0), (torch.float64, 1e-5), (torch.bfloat16, 0.1):
            other = build("resnet8", num_classes=10, small_input=True).to(dtype).eval()
            other.load_state_dict(weights)
            error = (other(x.to(dtype)) - net(x)).abs().max() / net(x).abs().max()
            self.assertLessEqual(error, tolerance)

    def test_initialisation_is_the_released_codes(self):
        torch.manual_seed(0)
        std = lambda w, expected: self.assertAlmostEqual(w.std().item() / expected, 1, delta=0.03)
        for arch, n_norms in ("resnet18", 2), ("resnet50", 3), ("resnext50_32x4d", 3):
            net = build(arch)
            for stage in net.layer1, net.layer4:
                for block in stage:
                    norms = (getattr(block, f"bn{k + 1}") for k in range(n_norms))
                    gammas = [norm.weight.unique().tolist() for norm in norms]
                    self.assertEqual(gammas, [[1.0]] * (n_norms - 1) + [[0.0]])
            std(net.layer4[0].conv2.weight, (2 / 9 / len(net.layer4[0].conv2.weight)) ** 0.5)
            std(net.fc.weight, 0.01)
            self.assertEqual(net.fc.bias.unique().tolist(), [0.0])
        net = build("efficientnet_b0")
        std(net.features[8][0].weight, (2 / 1280) ** 0.5)
        std(net.features[7][0].block[1][0].weight, (2 / 9) ** 0.5)  # depthwise: one output a group
        std(net.classifier[1].weight, (1 / 3000) ** 0.5)
        self.assertAlmostEqual(net.classifier[1].weight.abs().max().item(), 1000**-0.5, delta=1e-5)

    def test_the_view_shares_all_storage_also_after_steps(self):
        for kwargs in {"act": "smoothrelu"}, {"arch": "efficientnet_b0", "stochastic_depth": 0.2}:
            net = small(**kwargs).train()
            view, x, y = attacker_view(net), torch.rand(4, 3, 32, 32), torch.arange(4)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
            places = lambda tree: [(name, t.data_ptr()) for name, t in
                                   (*tree.named_parameters(), *tree.named_buffers())]
            self.assertEqual(places(net), places(view))
            self.assertTrue(torch.equal(view(x), copy.deepcopy(net).eval()(x)))

    def test_an_attack_through_the_view_leaves_no_trace(self):
        x, y = torch.rand(8, 3, 32, 32), torch.arange(8)
        for batch_stats in False, True:
            net = small().train()
            view, before = attacker_view(net, batch_stats=batch_stats), traces(net)
            x_adv = pgd(view, x, y, 8 / 255, 2 / 255, 3)
            self.assertEqual(before, traces(net))
            self.assertFalse(any(p.requires_grad or p.grad is not None for p in view.parameters()))
            self.assertEqual({m.training for m in view.modules()}, {False})
            self.assertGreater(F.cross_entropy(view(x_adv), y), F.cross_entropy(view(x), y) + 0.01)

    def test_the_view_with_batch_stats_is_train_mode_that_records_nothing(self):
        net, x = small().train(), torch.rand(8, 3, 32, 32)
        before, logits = traces(net), attacker_view(net, batch_stats=True)(x)
        self.assertEqual(before, traces(net))
        self.assertGreater((logits - attacker_view(net)(x)).abs().max(), 0.01)
        self.assertLess((logits - net(x)).abs().max(), 1e-6)  # which does record
        self.assertNotEqual(before, traces(net))

    def test_dropout_and_stochastic_depth_are_off_in_the_view(self):
        x = torch.rand(16, 3, 32, 32)
        b0 = "efficientnet_b0"
        for arch, rate in (b0, "dropout"), (b0, "stochastic_depth"), ("resnet8", "dropout"):
            net = small(arch, **{rate: 0.5}).train()
            self.assertTrue(torch.equal(attacker_view(net)(x), copy.deepcopy(net).eval()(x)))
            self.assertFalse(torch.equal(net(x), net(x)), (arch, rate))  # and on in the training net

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

    def test_wrong_networks_are_refused(self):
        refuses(self, SystemExit, "resnet51.*resnet50", build, "resnet51")
        refuses(self, SystemExit, "ReLU", attacker_view, small(act="silu"), smooth_backward=True)
        refuses(self, SystemExit, "ReLU", build, "resnet8", act="silu", smooth_backward=True)
        refuses(self, SystemExit, "EfficientNet", build, "resnet8", stochastic_depth=0.2)


# attacks

GOLDEN, WORD = 0x9E3779B97F4A7C15, 2**64


def splitmix(z):
    """The finalizer of SplitMix64 on Python's own integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
    return z ^ z >> 31


class TestAttacks(unittest.TestCase):
    """Any callable is a model; on a linear one the best attack is known, every pixel at its end."""

    def setUp(self):
        torch.manual_seed(0)
        self.x, self.y = torch.rand(6, 3, 8, 8), torch.arange(6) % 2
        self.x[:, :, 0], self.x[:, :, 1] = 0.0, 1.0
        w = torch.randint(1, 17, (192, 1)) / 128 * (torch.rand(192, 1) - 0.5).sign()
        self.w = torch.cat([-w, w], 1)
        self.up = self.w[:, 1 - self.y].T.sign().view_as(self.x)  # what raises the loss
        self.noise = torch.empty_like(self.x).uniform_(-0.05, 0.05)
        self.attack = partial(pgd, self.model, eps=0.1, step_size=0.03, steps=4)

    def model(self, x):
        return x.flatten(1) @ self.w

    def test_uniform_is_splitmix64(self):
        # The published stream from 1234567
        published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
        z = torch.tensor([(1234567 + k * GOLDEN + 2**63) % WORD - 2**63 for k in (1, 2, 3)])
        self.assertEqual([number % WORD for number in mix(z).tolist()], published)
        index = [0, 5, 2**40, 1281166]
        for counter in 7, (2, 0, 99), (1, torch.tensor([3, 1, 4, 1])):
            for n, u in enumerate(uniform(0, torch.tensor(index), counter, (2, 5))):
                key, words = 0, counter if isinstance(counter, tuple) else (counter,)
                for word in (index[n], *(int(w[n] if torch.is_tensor(w) else w) for w in words)):
                    key = splitmix((key * 3 + word + 1) % WORD)
                exact = [(splitmix((key + k * GOLDEN) % WORD) >> 40) / 2**24 for k in range(1, 11)]
                self.assertEqual(u.flatten().tolist(), exact)

    def test_uniform_belongs_to_the_image(self):
        every, index = uniform(3, torch.arange(500), (1, 2), (3, 4)), torch.randperm(500)
        for some in index, index[:1], index[:0]:
            self.assertTrue(torch.equal(uniform(3, some, (1, 2), (3, 4)), every[some]))
        counters = (0, 0), (0, 1), (1, 0), (2, 1)
        rows = {tuple(row) for seed, counter in itertools.product((*range(5), -1, 2**62), counters)
                for row in uniform(seed, torch.arange(50), counter, (3,)).tolist()}
        self.assertEqual(len(rows), 7 * 4 * 50)  # no seed, index or counter is another one shifted
        u = uniform(0, torch.arange(1000), 0, (1000,)).double()
        self.assertTrue(0 <= u.min() and u.max() < 1)
        self.assertAlmostEqual(u.mean().item(), 1 / 2, delta=2e-3)
        self.assertAlmostEqual(u.var().item(), 1 / 12, delta=5e-4)
        self.assertLess(torch.corrcoef(u[:200]).fill_diagonal_(0).abs().max(), 0.2)

    def test_pgd_is_optimal_on_a_linear_model(self):
        for eps in 4 / 255, 8 / 255, 0.3:
            best = (self.x.double() + eps * self.up).clamp(0, 1)
            for steps, step_size in (1, 2 * eps), (10, eps / 4):
                x_adv = pgd(self.model, self.x, self.y, eps, step_size, steps)
                self.assertLess((x_adv - best).abs().max(), 1e-7)

    def test_pgd_takes_k_signed_steps_from_its_start_and_returns_the_last(self):
        x, inner = self.x, (self.x > 0.15) & (self.x < 0.85)  # where neither box nor ball is met
        for steps in 0, 1, 4:
            seen = []
            model = lambda x: (seen.append(x), self.model(x))[1]
            x_adv = pgd(model, x, self.y, 0.1, 0.01, steps, self.noise)
            self.assertEqual(len(seen), steps)
            for k, iterate in enumerate([*seen, x_adv]):
                error = (iterate - (x + self.noise + k * 0.01 * self.up))[inner]
                self.assertLess(error.abs().max(), 1e-6)
        a, b = (self.attack(x, self.y, steps=0) for _ in range(2))  # without noise a fresh start
        self.assertTrue((a - b).abs().max() > 0.1 and 0.05 < (a - x)[inner].abs().mean() * 1.1 < 0.06)

    def test_pgd_stays_exactly_in_the_box_and_the_ball(self):
        x = torch.cat([torch.rand(200, 3, 8, 8), torch.randint(0, 256, (200, 3, 8, 8)) / 255])
        for eps in 1 / 255, 4 / 255, 8 / 255, 0.1, 64 / 255:
            for bound, sign in zip(ball(x, eps), (-1, 1)):
                exact = (x.double() + sign * eps).clamp(0, 1)
                self.assertLess((bound - exact).abs().max(), 1e-7)  # not much inside either
            for steps, noise in (0, torch.ones_like(x)), (0, -torch.ones_like(x)), (3, None):
                x_adv = pgd(self.model, x, torch.arange(400) % 2, eps, eps, steps, noise)
                self.assertTrue(0 <= x_adv.min() and x_adv.max() <= 1)
                delta = x_adv.double() - x.double()
                self.assertLessEqual(delta.abs().max().item(), eps)  # no tolerance

    def test_pgd_is_pure(self):
        net, y = small().eval(), torch.arange(4)
        x, noise = torch.rand(2, 4, 3, 32, 32)
        seen = lambda: (traces(net), digest(x), digest(noise), digest(torch.get_rng_state()))
        before = seen()
        self.assertFalse(pgd(net, x, y, 0.1, 0.02, 2, noise).requires_grad)
        self.assertEqual(before, seen())

    def test_neither_layout_nor_batch_matters(self):
        x, y, noise = self.x, self.y, self.noise
        expected, wide = self.attack(x, y, noise=noise), torch.stack([x, 1 - x], -1).flatten(3)
        for view in (x.to(memory_format=torch.channels_last), wide[..., ::2], x.mT.contiguous().mT):
            self.assertTrue(torch.equal(view, x) and not view.is_contiguous())
            self.assertTrue(torch.equal(self.attack(view, y, noise=noise), expected))
        each = [self.attack(x[i:i + 1], y[i:i + 1], noise=noise[i:i + 1]) for i in range(6)]
        self.assertTrue(torch.equal(torch.cat(each), expected))
        self.assertEqual(self.attack(x[:0], y[:0]).shape, (0, 3, 8, 8))
        channels = pgd(lambda x: x.sum((2, 3)), x, y, 0.1, 0.03, 7)  # its slope is one number, expanded
        self.assertGreater((channels - x).abs().max(), 0.09)

    def test_loss_scale_changes_nothing_but_saves_float16(self):
        x, y, w = self.x, self.y, self.w / 4
        sure = 16 * F.one_hot(y, 2)  # the model is certain, its slopes are 1e-9: nothing in float16
        single, half = (lambda x, dtype=dtype: (x.to(dtype).flatten(1) @ w.to(dtype)).float() + sure
                        for dtype in (torch.float32, torch.float16))
        run = lambda model, scale: pgd(model, x, y, 0.1, 0.03, 4, self.noise, scale)
        start = pgd(half, x, y, 0.1, 0, 0, self.noise)
        self.assertTrue(torch.equal(run(half, 1.0), start))  # it stands still
        for model in single, half:
            self.assertTrue(torch.equal(run(model, 2.0**16), run(single, 1.0)))

    def test_a_slope_that_is_not_finite_points_nowhere(self):
        roots = input_gradient(lambda x: x.flatten(1).sqrt(), self.x, lambda logits: logits.sum(1))[1]
        exact = torch.where(self.x > 0, 0.5 / self.x.sqrt(), 0)  # infinite at the black pixels
        self.assertTrue(torch.allclose(roots, exact, rtol=1e-5))
        nan = torch.where(torch.arange(6) == 0, math.nan, 1.0)[:, None]
        x_adv = pgd(lambda x: self.model(x) * nan, self.x, self.y, 0.1, 0.03, 4, self.noise)
        run = lambda steps: self.attack(self.x, self.y, steps=steps, noise=self.noise)
        self.assertTrue(torch.equal(x_adv, torch.cat([run(0)[:1], run(4)[1:]])))

    def test_arguments_that_would_make_the_attack_weak_are_refused(self):
        x, y, one = self.x, self.y, torch.arange(6) == 2
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2), nn.Dropout()).eval()
        net[2].train()  # one forgotten module is enough
        refuses(self, ValueError, "eval", pgd, net, x, y, 0.1, 0.1, 1)
        pgd(net, x, y, 0.1, 0.1, 1, check=False)
        for value in -0.01, 1.01, math.nan, math.inf:
            odd = torch.where(one[:, None, None, None], value, x)
            refuses(self, ValueError, r"pixels.*\[0, 1\]", self.attack, odd, y)
        for label in -1, 2, -100:
            refuses(self, ValueError, "labels.*2 classes", self.attack, x, torch.where(one, label, y))
        for odd in x.double(), (x * 255).byte(), x[0], x.flatten(1):
            refuses(self, ValueError, "float32", self.attack, odd, y)
        for odd in y.int(), y.float(), y[:5], y[:, None]:
            refuses(self, ValueError, "int64", self.attack, x, odd)
        self.attack(x * (1 + 5e-7), y)  # rounding is no reason


EPS = 0.05


def linear(classes=10, size=4, scale=1.0):
    """A linear model of (N, 3, size, size) images, whose best L-inf attack has a closed form."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes)).eval()
    net[1].weight.data *= torch.linspace(0.5, 2, classes)[:, None]  # the next class is not the nearest
    for parameter in net.parameters():
        parameter.data *= scale
    return net


def images(net, n=40, size=4):
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, net(x).argmax(1)


def can_fall(net, x, y, eps):
    """Which images of a linear model have an adversarial in ball and box: tries each wrong class."""
    weight, bias = net[1].weight.detach().double(), net[1].bias.detach().double()
    lower, upper = ((x.double() + side).clamp(0, 1).flatten(1)[:, None] for side in (-eps, eps))
    slope = weight[None] - weight[y][:, None]
    best = (torch.where(slope > 0, upper, lower) * slope).sum(2) + bias[None] - bias[y][:, None]
    return best.scatter(1, y[:, None], -torch.inf).amax(1) > 0


def verdicts(net, x, y, eps=EPS, **more):
    x_adv, report = autoattack(net, x, y, eps, torch.arange(len(x)), **more)
    return torch.tensor([name is not None for name in report["fooled_by"]]), x_adv, report


class AutoAttack(unittest.TestCase):
    def test_each_attack_fools_exactly_the_images_of_a_linear_model_that_can_be_fooled(self):
        # cross-entropy climbs all classes at once: beyond two it may rightly end beside the best one
        for attack, classes in (("apgd-ce", 2), ("apgd-t", 10), ("fab-t", 10), ("square", 10)):
            net = linear(classes, scale=1e-3)
            x, y = images(net, 120)
            possible = can_fall(net, x, y, EPS)
            self.assertTrue(20 < possible.sum() < 100)  # the claim has both sides
            fooled, x_adv, _ = verdicts(net, x, y, attacks=(attack,), queries=1000)
            self.assertFalse((fooled & ~possible).any(), attack)
            self.assertLessEqual((fooled != possible).sum(), 1, attack)  # 1% of 120
            self.assertTrue((net(x_adv).argmax(1) != y)[fooled].all())
            self.assertTrue((x_adv[~fooled] == x[~fooled]).all())

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

    def test_apgd_halves_its_step_until_it_hits_a_small_ball(self):
        x, y = torch.full((20, 3, 4, 4), 0.5), torch.zeros(20).long()
        centre = x[0] + EPS * torch.linspace(-0.9, 0.9, 48).view(3, 4, 4)
        inside = lambda x: (0.05 * EPS) ** 2 * 48 - ((x - centre) ** 2).sum((1, 2, 3))  # class 1's ball
        model = lambda x: torch.stack((0 * inside(x), inside(x)), 1)
        self.assertTrue(verdicts(model, x, y, attacks=("apgd-ce",))[0].all())

    def test_fab_projects_onto_a_plane_by_the_shortest_step_in_the_box(self):
        x, w = torch.rand(30, 3, 5, 5), torch.randn(30, 3, 5, 5)
        x = torch.where(torch.rand_like(x) < 0.3, x.round(), x)  # some pixels cannot move at all
        room = torch.where(w > 0, 1 - x, x).double()
        for share in (0.01, 0.5, 0.95):
            gap = share * (w.abs() * room).sum((1, 2, 3), keepdim=True)
            low, high = torch.zeros(30, 1, 1, 1).double(), torch.ones(30, 1, 1, 1).double()
            for _ in range(50):  # bisection on the length
                middle = (low + high) / 2
                far = (w.abs() * torch.minimum(room, middle)).sum((1, 2, 3), keepdim=True) >= gap
                low, high = torch.where(far, low, middle), torch.where(far, middle, high)
            step = to_hyperplane(x, w, gap.float().flatten()).double()
            length, moved = step.abs().amax((1, 2, 3)), (w * step).sum((1, 2, 3))
            torch.testing.assert_close(length, high.flatten(), rtol=0, atol=1e-5)
            torch.testing.assert_close(moved, gap.flatten(), rtol=1e-4, atol=1e-5)

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

    def test_the_targeted_dlr_loss_ignores_scale_and_shift_of_the_logits(self):
        logits, y, target = torch.tensor([[4.0, 1, 3, 2, 0]]), torch.tensor([0]), torch.tensor([2])
        for changed in (logits, 7 * logits + 3):  # -(4 - 3) / (4 - (2 + 1) / 2)
            self.assertAlmostEqual(float(targeted_dlr(changed, y, target)), -0.4, places=6)

    def test_verdicts_do_not_depend_on_the_batch_and_leave_no_trace(self):
        torch.manual_seed(0)
        net = build("resnet8", "silu", num_classes=10, small_input=True).eval()
        nn.init.normal_(net.fc.weight, std=1.0)
        x, y = images(net, 64, 32)
        before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
        for attack, eps, steps in (("apgd-ce", 0.15, 0), ("apgd-ce", 0.004, 9), ("square", 0.015, 0)):
            run = lambda rows: autoattack(
                net, x[rows], y[rows], eps, rows, attacks=(attack,), steps=steps,
                queries=60)[1]["forwards"]  # tells when an image fell
            parts = torch.cat([run(rows) for rows in torch.arange(64).split(7)])
            whole = run(torch.arange(64))
            self.assertTrue(5 < (whole < whole.max()).sum() < 60)
            self.assertLessEqual((whole != parts).sum(), 1)  # rounding
        self.assertTrue(torch.equal(state, torch.get_rng_state()))
        self.assertTrue(all(p.grad is None for p in net.parameters()))
        self.assertTrue(all(torch.equal(v, before[k]) for k, v in net.state_dict().items()))

    def test_masked_models_are_called_out_by_name(self):
        net = linear()
        x, _ = images(net)
        for reason, model in (("zero gradients", lambda x: 1e5 * net(x)),
                              ("zero gradients", lambda x: net((20 * x).round() / 20)),
                              ("masked gradients", lambda x: net((20 * x).round() / 20)),
                              ("random logits", lambda x: net(x + 0.05 * torch.randn_like(x))),
                              ("probabilities", lambda x: net(x).softmax(1)),
                              ("not finite", lambda x: net(x) / (x[:, 0, 0, :1] > 0.5)), (None, net)):
            warnings = verdicts(model, x, model(x).argmax(1), 0.1, steps=5, queries=200)[2]["warnings"]
            named = [warning for warning in warnings if warning.startswith(f"{reason}:")]
            self.assertTrue(named if reason else not warnings, (reason, warnings))
        with self.assertRaisesRegex(ValueError, "train mode"):
            verdicts(nn.Sequential(nn.Dropout(), net).train(), x, x[:, 0, 0, 0].long())
        self.assertEqual(doubts(1000, {"square": 9}) + doubts(1000, {"apgd-ce": 9, "square": 1}), [])

    def test_only_the_float32_model_fells_an_image(self):
        net = linear()
        x, y = images(net)
        fooled, _, _ = verdicts(lambda x: net(x).flip(1), x, y, verify=net, steps=9, queries=9)
        self.assertFalse((fooled & ~can_fall(net, x, y, EPS)).any())

    def test_ball_and_box_are_kept_exactly_in_any_layout_and_nan_is_never_returned(self):
        steep = lambda z: z - (z - z.detach()).sqrt()  # itself, with NaN for a slope
        for size, after in ((224, lambda z: z), (32, lambda z: z), (32, steep)):
            net = linear(size=size)
            x, model = images(net, 5, size)[0], lambda x: after(net(x))
            self.assertTrue(input_gradient(model, x, lambda logits: logits[:, 0])[1].isfinite().all())
            x[:2] = x[:2].round()
            for x in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
                for attack in STANDARD:
                    y = net(x).argmax(1)
                    _, x_adv, _ = verdicts(model, x, y, 0.03, attacks=(attack,), steps=4, queries=20)
                    self.assertTrue(((x_adv.double() - x.double()).abs() <= 0.03).all(), attack)
                    self.assertTrue((x_adv >= 0).all() and (x_adv <= 1).all())  # a NaN is neither

    def test_few_classes_empty_batches_and_wrong_images_are_handled(self):
        for classes, words in ((2, "skipped"), (3, "ran targeted cross-entropy")):
            net = linear(classes)
            x, y = images(net)
            fooled, _, report = verdicts(net, x, y, steps=20, queries=100)
            self.assertIn(words, report["warnings"][0])
            self.assertEqual(fooled.tolist(), can_fall(net, x, y, EPS).tolist())
        for n in (0, 1, 40):
            _, x_adv, report = verdicts(net, x[:n], (y[:n] + 1) % 3)
            self.assertTrue(torch.equal(x_adv, x[:n]))
            self.assertEqual((report["fooled_by"], report["forwards"].tolist()), ([None] * n, [2] * n))


# data

def same(a, b):
    """Two lists of batches agree in every number, pixel and label."""
    return len(a) == len(b) and all(
        torch.equal(s, t) for one, other in zip(a, b) for s, t in zip(one, other, strict=True))


def order(batches):
    """The numbers of all images, in order."""
    return [i for index, *_ in batches for i in index.tolist()]


def shown(batches):
    """The number of every image in the batches, and its pixels."""
    return {i: image for index, x, _ in batches for i, image in zip(index.tolist(), x)}


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
        for folder in "good/train/cat good/train/dog good/train/owl good/val/dog good/val/owl " \
                      "bad/train/cat bad/train/dog".split():
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

    def test_subsets_are_prefixes_of_one_fixed_permutation(self):
        for less, more in itertools.pairwise((0, 1, 10, 500, 999, 1000, 5000, None)):
            a, b = data.subset(1000, less).tolist(), data.subset(1000, more).tolist()
            self.assertEqual((len(a), a), (min(less, 1000), sorted(set(a) & set(b))))
        self.assertEqual(data.subset(1000).tolist(), list(range(1000)))
        classes = {i // 50 for i in data.subset(50_000, 1000).tolist()}  # folders come sorted by class
        self.assertGreater(len(classes), 500)

    def test_held_out_images_are_not_trained_on_and_at_most_a_tenth(self):
        for n, limit, holdout in itertools.product((1000, 15), (None, 200, 950), (0, 50, 90, 500)):
            train, held = data.hold_out(n, limit, holdout)
            self.assertEqual(len(held), min(holdout, min(n, limit or n) // 10))
            self.assertEqual(len(train), min(limit or n, n - len(held)))
            self.assertEqual(len({*train.tolist(), *held.tolist()}), len(train) + len(held))

    def test_an_epoch_covers_each_member_once_in_its_own_order(self):
        members = data.subset(500, 103)
        epoch = lambda number=3, seed=0, world=1: data.epoch_batches(members, number, seed, 10, world)
        self.assertEqual([len(batch) for batch in epoch()], [10] * 10 + [3])
        self.assertEqual(torch.cat(epoch()).sort().values.tolist(), members.tolist())
        orders = [tuple(torch.cat(e).tolist()) for e in (epoch(), epoch(), epoch(4), epoch(3, 1))]
        self.assertEqual(len(set(orders)), 3)
        for world in 2, 5:  # the same order, without a batch that leaves a process one image or none
            self.assertTrue(same([epoch(world=world)], [epoch()[:10]]))
        for n, size, world, lengths in ((7, 128, 1, [7]), (11, 5, 1, [5, 5]), (15, 8, 2, [8, 6]),
                                        (11, 8, 2, [8]), (4, 2, 2, [2, 2])):
            batches = data.epoch_batches(torch.arange(n), 0, 0, size, world)
            self.assertEqual([len(batch) for batch in batches], lengths)

    def test_a_stream_that_starts_late_is_the_tail_and_moves_no_other_random_number(self):
        shapes, folders = (self.shapes, 50, 16), (self.folders(), 15, 4)
        for (images, n, size), kwargs in ((shapes, {}), (shapes, {"autoaugment": True}), (folders, {}),
                                          (folders, {"workers": 2})):
            stream = partial(data.train_batches, images, torch.arange(n), size, 3, 1, **kwargs)
            before = torch.get_rng_state()
            whole = list(stream())
            self.assertEqual((len(whole), {len(batch[0]) for batch in whole[::4]}), (12, {size}))
            for start, steps in ((1, 2), 6), ((2, 4), 12):
                self.assertTrue(same(list(stream(start)), whole[steps:]))
            self.assertTrue(torch.equal(torch.get_rng_state(), before))

    def test_the_shares_of_the_processes_join_to_the_batch(self):
        members = data.subset(1000, 50)
        for world in 2, 3:
            stream = partial(data.train_batches, self.shapes, members, 18, 2, 1, (0, 0), world=world)
            steps = zip(*(stream(rank=rank) for rank in range(world)), strict=True)
            plan = partial(data.epoch_batches, members, seed=1, batch_size=18, world=world)
            for batch, shares in zip(plan(0) + plan(1), steps, strict=True):
                self.assertEqual(sorted(order(shares)), sorted(batch.tolist()))
                self.assertEqual(len({len(index) for index, *_ in shares}), 1)

    def test_augmentation_belongs_to_seed_epoch_and_image(self):
        for images, n in (self.shapes, 60), (self.folders(), 15):
            def views(size, epoch, seed, world=1):
                run = [batch for rank in range(world) for batch in data.train_batches(
                    images, torch.arange(n), size, epoch + 1, seed, (epoch, 0), rank, world)]
                self.assertTrue(all(torch.equal(y, images.y[index]) for index, _, y in run))
                return shown(run)
            one = views(5, 0, 0)
            split = views(15, 0, 0, 3)
            self.assertEqual(len(one | split), n)
            self.assertTrue(all(torch.equal(one[i], split[i]) for i in range(n)))
            for other in views(5, 1, 0), views(5, 0, 1):
                self.assertGreater(sum(not torch.equal(one[i], other[i]) for i in one), 0.9 * n)

    def test_crop_and_flip_is_a_naive_crop_and_flip(self):
        x, u = torch.randint(1, 256, (300, 3, 12, 10), dtype=torch.uint8), torch.rand(300, 3)
        u[0], u[1], offsets = 0.0, 1 - 2**-24, set()
        for image, ours, (a, b, c) in zip(x, data.crop_and_flip(x, u), u.tolist()):
            top, left = int(a * 9), int(b * 9)
            crop = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)))[:, top:top + 12, left:left + 10]
            self.assertTrue(np.array_equal(ours, crop if c < 0.5 else crop[:, :, ::-1]))
            offsets.add((top, left))
        self.assertTrue({(0, 0), (8, 8)} <= offsets)

    def test_evaluation_shards_join_exactly(self):
        for images, n in (self.shapes, 101), (self.folders(train=False), 10):
            members = data.subset(images.n, n)
            pixels = shown(data.eval_batches(images, torch.arange(images.n), 64))
            for world, workers in (1, 2), (3, 0):
                run = [batch for rank in range(world) for batch in
                       data.eval_batches(images, members[rank::world], 7, workers)]
                self.assertEqual(sorted(order(run)), members.tolist())
                self.assertTrue(all(torch.equal(y, images.y[index]) for index, _, y in run))
                self.assertTrue(all(torch.equal(image, pixels[i]) for i, image in shown(run).items()))
            if images.x is not None:
                ours = torch.stack([*pixels.values()]) * 255
                self.assertTrue(torch.equal(ours.round().byte(), images.x))

    def test_every_kind_of_image_decodes(self):
        images, before = self.folders(), torch.get_rng_state()
        run = shown(data.eval_batches(images, torch.arange(15), 4))
        self.assertTrue(torch.equal(torch.get_rng_state(), before))
        cat, cmyk, grey, palette, pixel, sixteen = (run[i] for i in (0, 5, 6, 7, 8, 9))
        exact = Image.open(images.paths[0]).resize((76, 64), Image.BICUBIC).crop((22, 16, 54, 48))
        self.assertTrue(np.array_equal((cat * 255).round(), np.array(exact).transpose(2, 0, 1)))
        for other in cmyk, palette:
            self.assertLess((other - cat).abs().mean(), 0.05)
        self.assertTrue(torch.equal(grey[0], grey[2]) and pixel.std((1, 2)).max() < 1e-6)
        self.assertLess((sixteen[0] - cat[0]).abs().mean(), 0.03)  # the same ramp, not all white

    def test_a_broken_image_gives_way_in_training_and_stops_evaluation(self):
        images = self.folders("bad")
        run = list(data.train_batches(images, torch.arange(10), 5, 2))
        self.assertEqual(sorted(order(run)), sorted([*range(6), 8, 8, 8, 9] * 2))  # for 6 and 7
        self.assertTrue(all(torch.equal(y, images.y[index]) for index, _, y in run))
        named = [Path(line.split(" (")[0]).name for line in images.broken]
        self.assertEqual(sorted(named), ["dog1.JPEG"] * 2 + ["dog2.JPEG"] * 4)
        for members, name, workers in ([0, 6, 1], "dog1", 0), ([8, 9, 7], "dog2", 1):
            batches = data.eval_batches(images, torch.tensor(members), 2, workers)
            refuses(self, SystemExit, f"{name}.JPEG", list, batches)
        refuses(self, SystemExit, "dog", list, data.train_batches(images, torch.tensor([6, 7]), 2, 1))

    def test_classes_map_by_name(self):
        val = self.folders(train=False, classes=self.folders().classes)
        self.assertEqual(val.classes, ["cat", "dog", "owl"])
        names = [Path(path).parent.name for path in val.paths]
        self.assertEqual([val.classes[k] for k in val.y], names)
        refuses(self, SystemExit, "dog.*cat", self.folders, train=False, classes=["cat", "owl"])

    def test_wrong_data_is_refused(self):
        refuses(self, SystemExit, "mnist.*shapes", data.load, "mnist", res=32)
        for folder in self.root / "nowhere", self.root / "good/train":
            refuses(self, SystemExit, "--data shapes", data.load, "imagenet", folder, res=224)
        refuses(self, SystemExit, "--download", data.load, "cifar10", self.root, res=32)
        for name, res in ("cifar10", 64), ("shapes", 8), ("imagenet", 8):
            refuses(self, SystemExit, f"--res {res}", data.load, name, self.root, res=res)
        refuses(self, SystemExit, "cifar10", data.load, "shapes", res=32, download=True)

    def test_shapes_are_made_of_numbers_that_nothing_else_uses(self):
        x, y = data.draw_shapes(40, 16, train=False)
        self.assertTrue(torch.equal(x, self.shapes.x[:40]) and y.bincount().tolist() == [4] * 10)
        self.assertFalse(torch.equal(x, data.draw_shapes(40, 16, train=True)[0]))
        with mock.patch("data.uniform", wraps=uniform) as draw:
            [data.draw_shapes(20, 16, train) for train in (False, True)]
        rows = lambda *args: set(map(tuple, uniform(*args, (3,)).tolist()))
        own = set().union(*(rows(*call.args[:3]) for call in draw.call_args_list))
        others = set().union(*(rows(seed, torch.arange(20), words) for seed in range(3)
                               for words in itertools.product(range(4), range(3))))
        self.assertEqual((len(own), len(own & others)), (80, 0))  # or starts repeat the noise

    @unittest.skipUnless(Path("data/cifar-10-batches-py").exists(), "no data/cifar-10-batches-py here")
    def test_cifar10_is_the_official_one(self):
        images = data.load("cifar10", train=False, res=32)
        official = Path("data/cifar-10-batches-py/test_batch").read_bytes()
        official = pickle.loads(official, encoding="bytes")
        self.assertTrue(np.array_equal(images.y, official[b"labels"]))
        self.assertTrue(np.array_equal(images.x.flatten(1).numpy(), official[b"data"]))
        self.assertEqual((images.classes[0], images.classes[9]), ("airplane", "truck"))


# What the tests of evaluate and train share

def quietly(main, *flags):
    """Run a script's main as its command line would -> what it printed, and its exit (None, code or sentence)."""
    text, handlers = io.StringIO(), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with mock.patch.object(sys, "argv", ["script.py", *map(str, flags)]), contextlib.redirect_stdout(text):
        try:
            main()
            code = None
        except SystemExit as stop:
            code = stop.code
    evaluate.asked.signal = None
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)
    return text.getvalue(), code


TINY = ("--data", "shapes", "--limit", 300, "--holdout", 30, "--epochs", 2, "--val-every", 1, "--device", "cpu")


class Half(nn.Module):
    """A small net on 8 x 8 images that is right on most of them and about half robust at eps 0.02."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.w1 = torch.randn(192, 32, generator=g) / 6
        self.w2 = torch.randn(32, 4, generator=g)
        self.n_images = 0
        self.eval()

    def forward(self, x):
        self.n_images += len(x)
        return torch.relu((x - 0.5).flatten(1) @ self.w1) @ self.w2


def half_images(n=90):
    x = uniform(7, torch.arange(n), 0, (3, 8, 8))
    y = Half()(x).argmax(1)
    y[::9] = (y[::9] + 1) % 4  # wrong from the start
    return torch.arange(100, 100 + n), x, y


def run_queue(model, batches, slots, **settings):
    settings = dict(eps=0.02, step_size=0.002, steps=6) | settings
    return list(pgd_queue(model, batches, slots, **settings))


class TestEvaluate(unittest.TestCase):

    def plain_loop(self, restarts, steps=6):
        """fooled[r, k, i]: does iterate k of restart r fool? By one full PGD for every k."""
        index, x, y = half_images()
        model, rows = Half(), []
        for r in range(restarts):
            noise = (2 * uniform(0, index, (0, r), x.shape[1:]) - 1) * 0.02
            rows.append(torch.stack([model(pgd(model, x, y, 0.02, 0.002, k, noise)).argmax(1) != y
                                     for k in range(steps + 1)]))
        return torch.stack(rows), model(x).argmax(1) == y

    def test_the_queue_equals_a_plain_loop_for_every_step_and_restart(self):
        fooled, correct = self.plain_loop(restarts=3)
        after = [int((correct & ~fooled[0, : k + 1].any(0)).sum()) for k in range(7)]
        robust = [int((correct & ~fooled[:r].flatten(0, 1).any(0)).sum()) for r in (1, 2, 3)]
        self.assertGreater(robust[0], robust[2])  # else a queue that forgets restarts would pass
        self.assertGreater(after[0], after[6])
        index, x, y = half_images()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
        for slots, rows in ((1, order[:40]), (7, order), (64, torch.arange(90)), (500, order)):
            batches = [(index[part], x[part], y[part]) for part in rows.split(20)]
            counts = evaluate.tally(run_queue(Half(), batches, slots, restarts=3), 6)
            part = torch.zeros(90, dtype=torch.bool)
            part[rows] = True
            with self.subTest(slots=slots):
                self.assertEqual(counts["n"], len(rows))
                self.assertEqual(counts["n_correct"], int((correct & part).sum()))
                self.assertEqual(counts["n_robust"], int((correct & part & ~fooled.flatten(0, 1).any(0)).sum()))
                self.assertEqual(counts["robust_after"], [
                    int((correct & part & ~fooled[0, : k + 1].any(0)).sum()) for k in range(7)])

    def test_each_image_has_one_line_that_tells_when_it_fell(self):
        fooled, correct = self.plain_loop(restarts=2)
        index, x, y = half_images()
        lines = run_queue(Half(), [(index, x, y)], 10, restarts=2)
        self.assertEqual(sorted(line["index"] for line in lines), index.tolist())
        for line in lines:
            i = line["index"] - 100
            first = fooled[:, :, i].nonzero().tolist()
            self.assertEqual(line["fell"], first[0] if correct[i] and first else None)

    def test_last_iterate_equals_plain_pgd_and_attacks_every_image(self):
        fooled, _ = self.plain_loop(restarts=1)
        index, x, y = half_images()
        counts = evaluate.tally(run_queue(Half(), [(index, x, y)], 16, last_iterate=True), 6)
        self.assertEqual(counts["robust_after"], (~fooled[0]).sum(1).tolist())
        self.assertEqual(counts["n_robust"], int((~fooled[0, 6]).sum()))

    def test_on_a_half_robust_model_the_queue_does_at_most_60_percent_of_the_work(self):
        index, x, y = half_images()
        model = Half()
        lines = run_queue(model, [(index, x, y)], 8, eps=0.01, steps=60, step_size=0.001)
        robust = evaluate.tally(lines, 60)["n_robust"]
        self.assertTrue(30 < robust < 60, robust)
        self.assertLess(model.n_images, 0.6 * 90 * 62)  # every slot counted, empty ones too
        self.assertLessEqual(sum(line["forwards"] for line in lines), model.n_images)

    def test_the_float32_model_has_the_last_word(self):
        index, x, y = half_images()
        never = lambda x: -Half()(x)  # a search that sees every image fooled
        truth = evaluate.tally(run_queue(Half(), [(index, x, y)], 90, steps=0), 0)
        found = evaluate.tally(run_queue(never, [(index, x, y)], 90, steps=0, exact=Half()), 0)
        self.assertEqual(found["n_robust"], truth["n_robust"])

    def test_logits_that_are_no_numbers_count_as_wrong(self):
        index, x, y = half_images()
        lines = run_queue(lambda x: Half()(x) * float("nan"), [(index, x, y)], 30)
        self.assertEqual({line["clean"] for line in lines}, {-1})

    def test_no_image_is_no_line(self):
        self.assertEqual(run_queue(Half(), [], 8), [])

    def test_wilson_intervals_are_the_published_ones(self):
        for k, n, low, high in ((0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)):
            self.assertAlmostEqual(evaluate.wilson(k, n)[0], low, 4)
            self.assertAlmostEqual(evaluate.wilson(k, n)[1], high, 4)

    def test_a_torn_ledger_line_is_dropped_and_other_processes_lines_are_read(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            whole = '{"index": %d, "label": 1, "clean": 1, "fell": null, "forwards": 2}\n'
            (folder / "a.0.jsonl").write_text(whole % 1 + whole[:20])
            (folder / "a.5.jsonl").write_text(whole % 9)
            ledger = evaluate.Ledger(folder, "a", 0, fresh=False)
            self.assertEqual(sorted(ledger.lines), [(1, None), (9, None)])
            ledger.write(json.loads(whole % 2))
            child = multiprocessing.get_context("fork").Process(
                target=lambda: evaluate.Ledger(folder, "a", 0, False))
            with contextlib.redirect_stderr(io.StringIO()):
                child.start()
                child.join()
            self.assertNotEqual(child.exitcode, 0)  # the lock is ours, until we read the file once more
            self.assertEqual((folder / "a.0.jsonl").read_text(), whole % 1 + whole % 2)
            ledger.file.close()
            self.assertEqual(evaluate.Ledger(folder, "a", 0, fresh=True).lines, {})

    def test_bad_input_gets_one_sentence(self):
        for flags, word in (
            (["--out", "nowhere"], "nowhere"), (["--weights", "nowhere.pt"], "--arch"),
            (["--weights", "nowhere.pt", "--arch", "resnet8", "--act", "relu", "--data", "shapes"], "nowhere.pt"),
            (["--weights", "x.pt", "--arch", "resnet9", "--act", "relu", "--data", "shapes"], "resnet9"),
            (["--weights", "x.pt", "--arch", "resnet8", "--act", "rely", "--data", "shapes"], "rely"),
        ):
            _, code = quietly(evaluate.main, *flags)
            self.assertIn(word, str(code))
            self.assertEqual(str(code).count("\n"), 0)


class TestTrain(unittest.TestCase):

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory(prefix="out put é")))

    def test_the_default_recipe_is_the_papers(self):
        args = train.get_args([])
        self.assertEqual((args.data, args.arch, args.act, args.epochs, args.wd), ("imagenet", "resnet50", "silu", 100, 1e-4))
        self.assertEqual((args.eps, args.step_size, args.steps, args.res), (4, 4, 1, 224))
        self.assertEqual((args.label_smoothing, args.nesterov, args.ema, args.dropout), (0, False, False, 0))
        rate = [train.lr_at(args, epoch, 0, 1000) / 0.4 for epoch in (0, 2.5, 5, 29, 30, 59, 60, 89, 90)]
        for got, want in zip(rate, (0.0002, 0.5002, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001)):
            self.assertAlmostEqual(got, want, 9)
        long = train.get_args(["--epochs", "200"])
        self.assertAlmostEqual(train.lr_at(long, 60, 0, 1000), 0.04, 9)
        self.assertAlmostEqual(train.lr_at(long, 59, 999, 1000), 0.4, 9)

    def test_onecycle_rises_to_the_peak_and_falls_to_zero(self):
        args = train.get_args(["--data", "cifar10"])
        rate = [train.lr_at(args, epoch, step, 10) for epoch in range(30) for step in range(10)]
        self.assertAlmostEqual(max(rate), 0.2)
        self.assertEqual(rate.index(max(rate)), 119)
        self.assertLess(rate[-1], 0.002)
        self.assertTrue(all(0 < r <= 0.2 for r in rate))

    def test_the_enhanced_recipe_is_sec_5_2(self):
        args = train.get_args(["--arch", "efficientnet_l1", "--enhanced"])
        self.assertEqual((args.wd, args.epochs, args.dropout, args.stochastic_depth, args.res), (1e-5, 200, 0.5, 0.2, 600))
        self.assertTrue(args.autoaugment and args.ema and args.early_stop)
        self.assertFalse(train.get_args(["--enhanced", "--no-ema", "--arch", "efficientnet_b0"]).ema)

    def test_only_convolution_and_linear_weights_decay(self):
        net = build("efficientnet_b0", "smoothrelu")
        decayed, free = train.parameter_groups(net, 1e-4)
        names = {id(p): name for name, p in net.named_parameters()}
        self.assertTrue(all(p.ndim in (2, 4) for p in decayed["params"]))
        self.assertTrue(all(p.ndim < 2 for p in free["params"]))
        self.assertEqual(len(decayed["params"]) + len(free["params"]), len(names))
        self.assertIn("features.0.2.beta", [names[id(p)] for p in free["params"]])

    def test_the_average_follows_its_formula(self):
        net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        ema, mean = averaged(net), None
        for t in range(5):
            with torch.no_grad():
                net[0].weight.fill_(float(t))
                net[1].running_var.fill_(float(t))
            ema.update_parameters(net)
            decay = min(0.9999, (1 + t) / (10 + t))
            mean = float(t) if mean is None else decay * mean + (1 - decay) * t
        self.assertAlmostEqual(ema.module[0].weight.item(), mean, 6)
        self.assertAlmostEqual(ema.module[1].running_var.item(), mean, 6)

    def test_training_noise_belongs_to_seed_epoch_and_image(self):
        args = train.get_args(["--data", "shapes"])
        net = attacker_view(build("resnet8", "silu", 10, small_input=True))
        index, y = torch.arange(6), torch.zeros(6, dtype=torch.long)
        x = uniform(0, index, 9, (3, 32, 32))
        adv = train.attack(args, net, x, y, index, 0)
        rows = torch.tensor([4, 1])
        self.assertLess((adv[rows] - train.attack(args, net, x[rows], y[rows], rows, 0)).abs().max(), 1e-6)
        for other in (train.attack(args, net, x, y, index, 1),
                      train.attack(train.get_args(["--data", "shapes", "--seed", "1"]), net, x, y, index, 0)):
            self.assertGreater((adv - other).abs().mean(), 1e-3)
        clean = train.get_args(["--data", "shapes", "--clean-start", "1", "--step-size", "2"])
        self.assertLess((train.attack(clean, net, x, y, index, 0) - x).abs().max(), 2.01 / 255)
        normal = train.get_args(["--data", "shapes", "--steps", "0"])
        self.assertIs(train.attack(normal, net, x, y, index, 0), x)

    def test_parts_of_a_batch_add_up_to_its_gradient(self):
        weights = []
        for accum in (1, 2, 5):
            args = train.get_args(["--data", "shapes", "--steps", "0", "--accum", accum and str(accum)])
            torch.manual_seed(0)
            net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
            run = SimpleNamespace(
                args=args, device=torch.device("cpu"), world=1, rank=0, epoch=0, step=0, trainee=net, net=net, ema=None,
                attacker=None, skipped=0, sums=torch.zeros(4, dtype=torch.float64),
                optimizer=torch.optim.SGD(net.parameters(), 1.0), scaler=torch.amp.GradScaler("cpu", enabled=False))
            index = torch.arange(10)
            train.train_step(run, index, uniform(0, index, 0, (3, 2, 2)), index, False)
            weights.append(net[1].weight.detach())
            self.assertEqual(run.sums[2], 10)
        self.assertLess((weights[0] - weights[1]).abs().max(), 1e-6)
        self.assertLess((weights[0] - weights[2]).abs().max(), 1e-6)

    def test_bad_flags_get_one_sentence_and_touch_nothing(self):
        for flags, word in (
            (["--eps", "-1"], "--eps"), (["--step-size", "0"], "--step-size"), (["--steps", "-1"], "--steps"),
            (["--smooth-backward", "both", "--act", "silu"], "relu"), (["--res", "8"], "--res"),
            (["--batch-size", "10", "--accum", "3"], "9 or 12"), (["--clean-start", "2"], "--clean-start"),
            (["--limit", "1"], "--limit"), (["--stochastic-depth", "0.2"], "EfficientNet"), (["--act-alpha", "2"], "alpha"),
            (["--data-dir", "nowhere", "--data", "imagenet"], "nowhere"),
            (["--data-dir", "nowhere", "--data", "cifar10"], "--download"),
            (["--early-stop", "--holdout", "0"], "--holdout"), (["--device", "tpu"], "tpu"),
        ):
            out = self.folder / "none"
            _, code = quietly(train.main, "--data", "shapes", "--out", out, *flags)
            with self.subTest(flags=flags):
                self.assertIn(word, str(code))
                self.assertFalse((out / "last.pt").exists())

    def test_a_run_is_not_overwritten_and_a_finished_one_says_so(self):
        out = self.folder / "run"
        text, code = quietly(train.main, *TINY, "--out", out)
        self.assertIsNone(code, text)
        self.assertIn("held-out clean", text)
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        self.assertLessEqual({"args.json", "log.txt", "log.jsonl", "model.pt", "best.pt", "last.pt", "last.prev.pt"}, set(before))
        _, code = quietly(train.main, *TINY, "--out", out)
        self.assertIn("--resume", code)
        self.assertEqual(before, {path.name: path.read_bytes() for path in out.iterdir()})
        _, code = quietly(train.main, *TINY, "--out", out, "--resume", "--eps", 4, "--log-every", 1)
        self.assertIn("--eps", code)
        self.assertNotIn("log", code)
        text, code = quietly(train.main, *TINY, "--out", out, "--resume")
        self.assertIsNone(code)
        self.assertIn("finished", text)

        # its evaluation, and its ledger
        text, code = quietly(evaluate.main, "--out", out, "--limit", 40, "--steps", 3, "--json", self.folder / "r.json")
        self.assertIsNone(code, text)
        report = json.loads((self.folder / "r.json").read_text())
        self.assertEqual((report["n"], report["eps"], report["step_size"], len(report["robust_after"])), (40, 8, 2, 4))
        lines = (ledger := next((out / "eval").glob("*.0.jsonl"))).read_text().splitlines(keepends=True)
        ledger.write_text("".join(lines[:7]) + lines[7][:9])  # killed in the middle
        quietly(evaluate.main, "--out", out, "--limit", 40, "--steps", 3, "--batch-size", 7, "--json", self.folder / "s.json")
        self.assertEqual(sorted(lines), sorted(ledger.read_text().splitlines(keepends=True)))
        again = json.loads((self.folder / "s.json").read_text())
        self.assertEqual({**report, "seconds": 0}, {**again, "seconds": 0})
        text, _ = quietly(evaluate.main, "--out", out, "--limit", 50, "--steps", 3)
        self.assertIn("going on from 40 lines", text)

        # a damaged checkpoint gives way to the one before, two to a sentence
        last = out / "last.pt"
        raw = bytearray(last.read_bytes())
        raw[len(raw) // 2] ^= 1
        last.write_bytes(raw)
        text, code = quietly(train.main, *TINY, "--out", out, "--resume")
        self.assertIn("last.prev.pt", text)
        (out / "last.prev.pt").write_bytes(b"")
        last.write_bytes(raw)
        _, code = quietly(train.main, *TINY, "--out", out, "--resume")
        self.assertIn("damaged", code)

    def test_weights_that_execute_code_or_do_not_fit_are_refused(self):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(folder / "pwned"),)
        folder = self.folder
        torch.save({"model": Evil()}, folder / "evil.pt")
        with self.assertRaisesRegex(SystemExit, "evil.pt"):
            load_file(folder / "evil.pt")
        self.assertFalse((folder / "pwned").exists())
        torch.save(build("resnet8").state_dict(), folder / "small.pt")
        with self.assertRaisesRegex(SystemExit, "tensors differ"):
            load_weights(build("resnet20"), folder / "small.pt")

    def test_nan_stops_the_run_and_is_never_saved(self):
        def poisoned(run, *_):
            step(run, *_)
            if run.step == 4 and run.epoch == 1:
                with torch.no_grad():
                    run.net.fc.bias[0] = float("nan")
            return 0.0
        step = train.train_step
        with mock.patch.object(train, "train_step", poisoned):
            _, code = quietly(train.main, *TINY, "--batch-size", 50, "--out", self.folder, "--log-every", 1, "--resume")
        self.assertIn("epoch 2, step 5", code)
        self.assertIn("last.pt", code)
        state = load_file(self.folder / "last.pt")
        self.assertTrue(all(t.isfinite().all() for t in state["model"].values()))
        self.assertEqual((state["epoch"], state["step"]), (1, 0))

    def test_a_collapse_of_robustness_ends_the_run_and_keeps_the_best_weights(self):
        robust = iter([12, 20, 13, 30])
        counts = lambda *_: {"n": 30, "n_correct": 25, "n_robust": next(robust)}
        with mock.patch.object(train, "validate", counts):
            text, code = quietly(train.main, *TINY, "--epochs", 9, "--early-stop", "--out", self.folder, "--resume")
        self.assertIsNone(code)
        self.assertIn("catastrophic overfitting", text)
        state = load_file(self.folder / "last.pt")
        self.assertEqual((state["epoch"], state["best_epoch"]), (3, 2))
        best, kept = (load_file(self.folder / name) for name in ("best.pt", "model.pt"))
        self.assertTrue(all(torch.equal(best[name], kept[name]) for name in best))
        self.assertFalse(all(torch.equal(best[name], state["model"][name]) for name in best))

    def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(self):
        flags = [*TINY, "--batch-size", 20, "--epochs", 3, "--act", "relu", "--smooth-backward", "both", "--ema"]
        whole, killed = self.folder / "whole", self.folder / "killed"
        quietly(train.main, *flags, "--out", whole)
        command = [sys.executable, "train.py", *map(str, flags), "--out", str(killed), "--save-every", "0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        log = killed / "log.jsonl"
        while not (log.exists() and '"kind": "val", "epoch": 1' in log.read_text()):
            time.sleep(0.01)
        time.sleep(0.2)
        process.kill()
        process.wait()
        text, code = quietly(train.main, *flags, "--out", killed, "--resume", "--save-every", "0")
        self.assertRegex(text, "going on at epoch [123], step")  # not from the start
        self.assertEqual(code, None)
        a, b = (load_file(folder / "last.pt") for folder in (whole, killed))
        for part in ("model", "ema"):
            for name, tensor in a[part].items():
                self.assertTrue(torch.equal(tensor, b[part][name]), name)
        self.assertEqual([json.loads(l) for l in (whole / "log.jsonl").open() if '"val"' in l],
                         [json.loads(l) for l in log.open() if '"val"' in l])

    def test_two_processes_share_one_network_and_count_each_image_once(self):
        out = self.folder / "two"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*torchrun, "test_all.py", "two-ranks", *map(str, TINY), "--out", str(out)],
                              capture_output=True, text=True, env=environment)
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        one, two = self.folder / "one.json", out / "two.json"
        quietly(evaluate.main, "--out", out, "--limit", 41, "--steps", 4, "--json", one, "--fresh")
        one, two = (json.loads(path.read_text()) for path in (one, two))
        self.assertEqual(two["processes"], 2)
        for name in ("n", "n_correct", "n_robust", "robust_after"):
            self.assertEqual(one[name], two[name])


def two_ranks():
    """What each of two gloo ranks runs for the test above: training, with a check after each step, then evaluation."""
    step, flags = train.train_step, sys.argv[2:]

    def checked(run, *batch):
        share = step(run, *batch)
        buffers = torch.cat([b.flatten().double() for b in run.net.buffers()])
        other = buffers.clone()
        torch.distributed.all_reduce(other, torch.distributed.ReduceOp.MAX)
        assert torch.equal(buffers, other), "BatchNorm's statistics differ between the ranks"
        assert len(batch[0]) * 2 <= run.args.batch_size
        return share

    train.train_step = checked
    sys.argv = ["train.py", *flags]
    keep = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None
    train.main()
    out = flags[flags.index("--out") + 1]
    sys.argv = ["evaluate.py", "--out", out, "--limit", "41", "--steps", "4", "--json", out + "/two.json"]
    evaluate.main()
    keep()


class Straight(nn.Module):
    """The class is the sign of (the mean of the pixels - 1/2): a net whose robustness is known; and its masks."""

    def __init__(self, slope=100.0, before=lambda x: x, after=lambda z: z, bend=lambda m: m):
        super().__init__()
        self.slope, self.before, self.after, self.bend = slope, before, after, bend
        self.eval()

    def forward(self, x):
        z = self.slope * self.bend(self.before(x).mean((1, 2, 3)) - 0.5)
        return self.after(torch.stack((-z, z, -z.abs() - 1, -z.abs() - 2), 1))


class Rounded(torch.autograd.Function):
    """Levels of 1/64, and the slope of a staircase, which is 0."""

    @staticmethod
    def forward(ctx, x):
        return (64 * x).round() / 64

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


def toy_images(low=0.01, high=0.09, n=150):
    """Labels by turns; the mean of the pixels is `low` to `high` from 1/2."""
    index, y = torch.arange(n), torch.arange(n) % 2
    x = uniform(5, index, 0, (3, 8, 8))
    far = torch.linspace(low, high, n) * (2 * y - 1) - 0.4 * x.mean((1, 2, 3))
    return index, 0.5 + 0.4 * x + far[:, None, None, None], y


def two_cues(n=300):
    """Four pixels that an attack of 8/255 leaves standing tell the label, and the others, that it does not."""
    index, y = torch.arange(n), torch.arange(n) % 2
    cue = 6 / 255 * torch.sign(uniform(6, index[:1], 0, (192,)) - 0.5)
    cue[:, :4] = 0.06
    return index, 0.4 + 0.2 * uniform(5, index, 0, (3, 8, 8)) + ((2 * y - 1)[:, None] * cue).view(n, 3, 8, 8), y


def toy_net(steps):
    """Trained on the two cues, with PGD or, at 0 steps, without."""
    torch.manual_seed(0)
    _, x, y = two_cues()
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.SiLU(), nn.Linear(16, 4)).eval()
    optimizer = torch.optim.Adam(net.parameters(), 0.01, weight_decay=1e-3)
    for _ in range(150):
        x_adv = pgd(net, x, y, 8 / 255, 8 / 255, steps) if steps else x
        loss = F.cross_entropy(net(x_adv), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def doubted(net, images=toy_images(), **others):
    return {d["what"]: d["verdict"] for d in sanity.doubts(net, *images, eps=8, step_size=2, **others)}


class TestSanity(unittest.TestCase):

    def caught(self, seen, *names):
        for name in names:
            self.assertIn(seen[name], ("WARN", "FAIL"), f"{name}: {seen}")
        self.assertIn("FAIL", seen.values())

    def test_an_adversarially_trained_net_passes_every_doubt_and_a_normal_one_does_not(self):
        images, robust, normal = two_cues(), toy_net(1), toy_net(0)
        seen = doubted(robust, images, surrogate=normal, normal=normal)
        self.assertEqual(set(seen.values()), {"PASS"}, seen)
        self.caught(doubted(normal, images), "robust", "robust to PGD-1, and to PGD-50")
        self.caught(doubted(robust, images, normal=robust), "a normal net stands")

    def test_a_straight_net_passes_whatever_the_doubt(self):
        self.assertEqual(set(doubted(Straight()).values()), {"PASS", "SKIP"})

    def test_saturated_logits_are_caught(self):
        self.caught(doubted(Straight(1e7)), "zeros in the input gradient", "fooled by steps 1 to 200",
                    "robust at eps 64", "left, by APGD too; Square fools", "loss rises towards the attack")

    def test_an_input_rounded_without_a_gradient_is_caught(self):
        self.caught(doubted(Straight(before=Rounded.apply)), "zeros in the input gradient", "robust at eps 64",
                    "fooled by steps 1 to 200", "left, by APGD too; Square fools", "loss rises towards the attack")

    def test_a_random_layer_and_a_softmax_are_caught(self):
        noise = torch.Generator().manual_seed(0)
        random = lambda z: z + 2 * torch.randn(z.shape, generator=noise)
        self.caught(doubted(Straight(after=random)), "two calls differ", "loss rises towards the attack")
        self.caught(doubted(Straight(after=lambda z: z.softmax(1))), "outputs that are no logits")

    def test_overfitting_to_one_step_is_caught(self):
        """Wrong only on the way: at a quarter of eps, not at the three quarters where PGD-1 lands."""
        trench = lambda m: m * (1 - 3 * torch.exp(-((m.abs() - 0.038) / 0.006) ** 2))
        self.caught(doubted(Straight(bend=trench), toy_images(0.049, 0.051)), "robust to PGD-1, and to PGD-50")

    def test_a_threshold_allows_for_the_interval_and_for_the_papers_own_relu(self):
        few, many = (sanity.judge("", torch.arange(n) < 0.07 * n, 0.05, 0.2, "")["verdict"] for n in (50, 5000))
        self.assertEqual((few, many), ("PASS", "WARN"))
        relu = sanity.judge("", torch.arange(487) < 330, 0.5, 0.25, "")  # SAT: PGD-1 48.7%, PGD-200 33.0%
        self.assertEqual(relu["verdict"], "PASS")
        self.assertEqual(sanity.judge("", torch.zeros(0), 0, 0.1, "")["verdict"], "SKIP")

    def test_a_surface_has_the_clean_loss_in_its_middle_and_roughness_is_curvature(self):
        index, x, y = toy_images(n=1)
        net, delta = toy_net(0), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        d1, d2 = sanity.directions(delta, index)
        self.assertAlmostEqual((d1 * d2).mean().item(), 0, delta=1e-6)
        self.assertAlmostEqual(d2.square().mean().item(), 1, delta=1e-5)
        z = sanity.loss_surface(net, x, y, d1, d2, 0.1, 5)
        self.assertAlmostEqual(z[2, 2], F.cross_entropy(net(x), y).item(), places=5)
        self.assertAlmostEqual(z[4, 1], F.cross_entropy(net(x + 0.1 * d1 - 0.05 * d2), y).item(), places=4)
        a, b = np.meshgrid(np.arange(9.0), np.arange(9.0), indexing="ij")
        self.assertAlmostEqual(sanity.roughness(3 * a - 2 * b), 0)
        self.assertAlmostEqual(sanity.roughness(a**2 + 2 * b**2), (2**2 + 4**2) / 2)

    def test_pictures_are_written_with_round_ticks_and_a_torn_log_is_read(self):
        for lo, hi in ((0, 1), (-3.2, 7.9), (1e-4, 3e-4), (59.8, 61)):
            marks = sanity.ticks(lo, hi, 8)
            self.assertTrue(3 <= len(marks) <= 9 and lo <= marks[0] and marks[-1] <= hi + 1e-9, marks)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            line = {"kind": "epoch", "epoch": 1, "loss": 2.0}, {"kind": "val", "epoch": 1, "clean": 0.5, "robust": 0.2}
            Path(folder, "log.jsonl").write_text("\n".join(map(json.dumps, line)) + '\n{"kind": "ep')
            r = dict(attack="pgd", steps=200, eps=4, data="imagenet", arch="resnet50", act="silu", res=224, n=100,
                     n_correct=70, n_robust=40)
            Path(folder, "r.json").write_text(json.dumps(r))
            for command, rest, size in (("curves", [folder], (1260, 360)), ("scatter", [f"{folder}/r.json"], (840, 560))):
                for scale in (1, 2):
                    args = sanity.get_args([command, *rest, "--scale", str(scale), "--png", f"{folder}/{command}.png"])
                    getattr(sanity, command)(args)
                    image = Image.open(f"{folder}/{command}.png")
                    self.assertEqual(image.size, (size[0] * scale, size[1] * scale))
                    self.assertGreater((np.asarray(image.convert("L")) < 200).mean(), 0.004)


class TestReadme(unittest.TestCase):
    text = Path(__file__).with_name("README.md").read_text()

    def commands(self):
        """Every command of the README that runs a script of ours -> (script, its arguments)."""
        for line in re.findall(r"`([^`\n]+)`", self.text) + self.text.splitlines():
            for script, flags in re.findall(r"(?:python|run|\d) (train|evaluate|sanity)\.py([^`|&#\n]*)", line):
                if re.match(r"\.?(?:venv|python|torchrun|\.venv|python3)", line.strip()):
                    if "--help" not in flags and "squareplus" not in flags:
                        yield script, flags.split()

    def test_every_command_is_understood_by_its_script(self):
        commands = list(self.commands())
        self.assertGreater(len(commands), 120)
        for script, flags in commands:
            with self.subTest(script=script, flags=" ".join(flags)), contextlib.redirect_stderr(io.StringIO()):
                args = {"train": train, "evaluate": evaluate, "sanity": sanity}[script].get_args(flags)
                if script == "train":
                    train.check(args, 8 if args.data == "imagenet" else 1)
                    with torch.device("meta"):
                        train.network(args, 10, args.data != "imagenet")

    def test_every_row_of_the_paper_has_its_commands(self):
        runs = {line.split("train.py ")[1].split(" --out")[0] for line in self.text.splitlines() if "train.py --" in line}
        for act in ("relu", "psoftplus", "silu", "gelu", "elu", "smoothrelu", "softplus"):  # Fig. 3, Sec. 7
            self.assertIn(f"--act {act}", runs)
            self.assertIn(f"--data cifar10 --act {act}", runs)
        for who in ("attacker", "optimizer", "both"):  # Table 1
            self.assertIn(f"--act relu --smooth-backward {who}", runs)
        for alpha in ("1.2", "1.4", "1.6", "1.8", "2.0"):  # Table 2
            self.assertLessEqual({f"--act elu --act-alpha {alpha}", f"--act celu --act-alpha {alpha}"}, runs)
        for sizes in ("--arch resnet101", "--arch resnet152", "--arch resnext50_32x4d", "--arch resnext50_32x8d",
                      "--res 299", "--res 380", "--arch resnext152_32x8d --res 380"):  # Table 3
            self.assertIn(f"{sizes} --act silu", runs)
        for sizes in ("--arch resnet152", "--arch resnext50_32x8d", "--res 380", "--arch resnext152_32x8d --res 380"):
            self.assertIn(f"{sizes} --act relu", runs)  # Sec. 5.1
        for name in ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "l1", "l1 --enhanced", "l1 --enhanced --steps 0"):
            self.assertIn(f"--arch efficientnet_{name}", runs)  # Fig. 4, Sec. 5.2
        self.assertLessEqual({"--act relu --steps 0", "--act relu --steps 0 --smooth-backward optimizer",
                              "--act relu --steps 2", "--act relu --epochs 200"}, runs)  # Sec. 3.2, 3.3
        for part in ("sanity.py activations", "sanity.py landscape", "sanity.py cost", "--eps 8", "--eps 16",
                     "--steps 1 --step-size 4 --smooth-backward attacker"):
            self.assertIn(part, self.text)


if __name__ == "__main__":
    two_ranks() if sys.argv[1:2] == ["two-ranks"] else unittest.main()
