"""Rounding noise in every matrix product and convolution of torch, as another processor's kernels would have it.

Another processor, another number of threads or another build of the BLAS adds the same products in another order, and the last
digits differ. Within one process the order depends on the shape: the same image decoded in a batch of 8 and alone differs in its
last digits on one machine and agrees bit for bit on the next. `pytest --perturb` makes that difference certain, on any machine:

* The result of each product is multiplied by 1 + u, |u| <= 8.4 eps of its type: 1e-6 in float32, 2e-15 in float64, whose laws
  compare at float64's own scale. bf16 and fp16 are summed in float32 and rounded once, so there a value moves to its
  neighbour or not at all: |u| <= eps / 2.
* u is a function of the operator, the shapes of its arguments and the place within a row. The same computation done again gives
  the same bits; in a batch of another size it does not. All rows of one call get the same u: a kernel treats them alike.

The noise is part of torch's dispatcher, so it reaches backward passes, all threads and inference mode. Child processes that
inherit the environment are perturbed as well: this folder is on their PYTHONPATH, and torch calls `from_environment` at the
end of its own import (the entry point group `torch.backends`). --perturb-seed seeds the noise: one seed, one imaginary processor.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    import torch

VARIABLE = "GPOBENCH_PERTURB"  # its value is the seed
FULL, SHORT = 1e-6 / 2**-23, 0.5  # of eps: types that are summed in themselves, types that are summed in float32
PERIOD = 65521  # a prime, so that the rows of a large result do not repeat in step with the noise

# Results are the returned tensors, whether new, given as `out` or changed in place. What these call is C++ below the dispatcher
# or another operator of this list.
PRODUCTS = (
    "mm", "mm.out", "addmm", "addmm.out", "addmm_", "_addmm_activation", "_addmm_activation.out", "bmm", "bmm.out", "baddbmm",
    "baddbmm.out", "baddbmm_", "addbmm", "addbmm.out", "addbmm_", "addmv", "addmv.out", "addmv_", "dot", "vdot", "convolution",
    "convolution_backward", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward", "_native_multi_head_attention", "mkldnn_rnn_layer",
    "mkldnn_rnn_layer_backward",
)  # fmt: skip

_libraries: list[Any] = []  # while they live, their kernels stay registered


def from_environment() -> None:
    """Perturb this process where the environment says so; torch calls this at the end of its import."""
    if seed := os.environ.get(VARIABLE):
        install(int(seed))


def install(seed: int) -> None:
    """Put the noise around torch's own CPU kernels, once a process."""
    import torch

    if _libraries:
        return
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*overridden", category=UserWarning)  # that is the purpose
        for name in PRODUCTS:
            own = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, _perturbed(own, name, seed), "CPU", with_keyset=True)


def _perturbed(own: Any, name: str, seed: int) -> Callable[..., Any]:
    import torch

    def product(keys: Any, *args: Any, **kwargs: Any) -> Any:
        result = own.call_boxed(keys, *args, **kwargs)
        shapes = tuple([a.shape for a in args if isinstance(a, torch.Tensor)])
        for k, part in enumerate(result if isinstance(result, tuple) else (result,)):
            if isinstance(part, torch.Tensor) and part.is_floating_point() and part.numel():
                part.mul_(_factor((seed, name, k, shapes), part.shape, part.dtype))
        return result

    return product


def _factor(call: Any, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """1 + u for one row of a result, (1, ...) to be broadcast over the rows."""
    import torch

    row = shape[1:]
    count = row.numel()
    start = zlib.crc32(repr(call).encode()) % PERIOD
    factors = _factors(
        torch.float64 if dtype == torch.float64 else torch.float32, _relative(dtype), -(-count // PERIOD) + 1
    )
    return factors[start : start + count].view(row)


def _relative(dtype: torch.dtype) -> float:
    """The largest |u| in a type."""
    import torch

    return (FULL if dtype in (torch.float32, torch.float64) else SHORT) * torch.finfo(dtype).eps


@lru_cache
def _factors(dtype: torch.dtype, relative: float, periods: int) -> torch.Tensor:
    """(periods * PERIOD,): 1 + u, u uniform; the beginning does not depend on how many periods there are."""
    import torch

    with torch.inference_mode(False):  # kept for all later calls, whatever mode the first one ran in
        u = torch.rand(PERIOD, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
        return (1 + relative * u).to(dtype).repeat(periods)


# The plugin


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perturbed", "rounding noise in every matrix product and convolution (tests/perturbed)")
    group.addoption("--perturb", action="store_true", help="last digits as on another processor")
    group.addoption("--perturb-seed", type=int, default=1, metavar="N", help="which one; 1 unless told otherwise")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--perturb"):
        os.environ[VARIABLE] = str(config.getoption("--perturb-seed"))
        here = os.path.dirname(os.path.abspath(__file__))
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        from_environment()


def pytest_report_header() -> str | None:
    seed = os.environ.get(VARIABLE)
    return f"perturbed: rounding noise in every product and convolution, seed {seed}" if seed else None
