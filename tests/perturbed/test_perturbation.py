"""The perturbation bites: another batch gives other digits, the same computation the same ones, by the size it states."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from selection import EXACT, SAMPLE

HERE = Path(__file__).parent

# Each of these is computed on 4 rows and on the first 3 of them, twice, before and after the noise was installed.
PRODUCTS = """
import json, sys, threading
import torch, perturbation
from torch.nn import functional as F

g = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=g)
w, b, k, k1, k3, kt = draw(8, 8), draw(8), draw(8, 8, 3, 3), draw(8, 8, 3), draw(8, 8, 3, 3, 3), draw(8, 8, 3, 3)
lstm, heads = torch.nn.LSTM(8, 8, batch_first=True), torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()

def slope(f):
    def of(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x).sin().sum(), x)[0]
    return of

def inference(x):
    with torch.inference_mode():
        return (x @ w).clone()

def thread(x):
    found = []
    worker = threading.Thread(target=lambda: found.append(x @ w))
    worker.start(), worker.join()
    return found[0]

attention = lambda x: F.scaled_dot_product_attention(x, 2 * x, x)
conv = lambda x: F.conv2d(x, k, b, padding=1)
flat, tokens, image = draw(4, 8), draw(4, 5, 8), draw(4, 8, 6, 6)
WORK = {
    "mm": (flat, lambda x: x @ w), "linear": (flat, lambda x: F.linear(x, w, b)), "linear 3d": (tokens, lambda x: F.linear(x, w, b)),
    "linear without bias": (tokens, lambda x: F.linear(x, w)), "bmm": (tokens, lambda x: x @ x.mT),
    "baddbmm": (tokens, lambda x: torch.baddbmm(torch.ones(len(x), 5, 5), x, x.mT)), "mv": (flat, lambda x: x @ b),
    "einsum": (tokens, lambda x: torch.einsum("bij,kj->bik", x, w)), "conv1d": (tokens.mT, lambda x: F.conv1d(x, k1)),
    "conv2d": (image, conv), "conv3d": (image[:, :, None].repeat(1, 1, 3, 1, 1), lambda x: F.conv3d(x, k3)),
    "transposed": (image, lambda x: F.conv_transpose2d(x, kt)), "lstm": (tokens, lambda x: lstm(x)[0].detach()),
    "attention": (tokens[:, None], attention), "heads": (tokens, lambda x: heads(x, x, x)[0].detach()),
    "out": (flat, lambda x: torch.mm(x, w, out=torch.empty(len(x), 8))), "in place": (flat, lambda x: torch.ones(len(x), 8).addmm_(x, w)),
    "inference": (flat, inference), "thread": (flat, thread), "backward of linear": (flat, slope(lambda x: F.linear(x, w, b))),
    "backward of conv2d": (image, slope(conv)), "backward of attention": (tokens[:, None], slope(attention)),
    "float64": (flat.double(), lambda x: x @ w.double()), "bf16": (flat.bfloat16(), lambda x: x @ w.bfloat16()),
}
plain = {name: f(x) for name, (x, f) in WORK.items()}
perturbation.install(int(sys.argv[1]))
told = {}
for name, (x, f) in WORK.items():
    whole, again, part = f(x), f(x), f(x[:3])
    relative = ((whole.double() - plain[name].double()).abs() / plain[name].double().abs()).max()
    apart = (whole[:3].double() - part.double()).abs().max()
    told[name] = [bool(torch.equal(whole, again)), float(apart), float(relative), whole.double().flatten()[:20].tolist()]
same = torch.ones(3, 8) @ w
told["rows alike"] = bool(torch.equal(same[0], same[2]))
told["zero stays"] = bool(((torch.zeros(3, 8) @ w) == 0).all())
told["wide"] = float((torch.ones(2, 1) @ torch.ones(1, 70000) - 1).abs().max())
print(json.dumps(told))
"""


def child(code: str, *argv: str, **environment: str) -> Any:
    clean = {key: value for key, value in os.environ.items() if key != "GPOBENCH_PERTURB"}
    env = {**clean, "PYTHONPATH": str(HERE), **environment}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return child(PRODUCTS, "1")


def test_the_same_computation_repeats_and_another_batch_differs(told: dict[str, Any]) -> None:
    rows = {name: said for name, said in told.items() if isinstance(said, list)}
    assert not [name for name, (repeats, *_) in rows.items() if not repeats]
    assert not [name for name, (_, apart, *_) in rows.items() if not apart]
    assert told["rows alike"] and told["zero stays"]


def test_the_noise_has_the_size_it_states(told: dict[str, Any]) -> None:
    relative = {name: said[2] for name, said in told.items() if isinstance(said, list)}
    eps = 2.0**-23
    for name in ("mm", "mv", "conv1d", "conv2d", "conv3d", "transposed", "inference", "thread", "out"):
        assert 2e-7 < relative[name] <= 1e-6 + 4 * eps, name  # one product, and the roundings of what is multiplied
    assert 4e-16 < relative["float64"] <= 1.9e-15 + 4 * 2.0**-52
    assert 0 < relative["bf16"] <= 2.0**-7  # a neighbour at most
    assert 0.9e-6 < told["wide"] <= 1e-6 + eps


def test_another_seed_is_another_processor(told: dict[str, Any]) -> None:
    other = child(PRODUCTS, "2")
    assert all(other[name][3] != said[3] for name, said in told.items() if isinstance(said, list) and name != "bf16")


def test_a_child_process_inherits_it() -> None:
    code = "import torch; x = torch.arange(1.0, 33).view(4, 8) / 3; print((x @ x.T).tolist())"
    assert child(code, GPOBENCH_PERTURB="1") != child(code) == child(code)


def test_the_selection_names_files_that_exist() -> None:
    files = {path.name for path in HERE.parent.rglob("test_*.py")}
    assert files >= EXACT | SAMPLE.keys() and not EXACT & SAMPLE.keys()
