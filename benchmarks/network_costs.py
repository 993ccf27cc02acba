"""Computes sizes and costs of the named models' networks on the meta device, and writes bench/models/network_costs.json.

To be run where a version of torch, diffusers, transformers or peft is pinned anew: with other versions the table is not used, and
every estimate computes its entries again.
Run: python benchmarks/network_costs.py [model ...]
"""

import sys
from collections.abc import Sequence

from gpobench.bench import registry
from gpobench.bench.model_spec import find_model_spec
from gpobench.bench.models.memory import table_entries
from gpobench.bench.models.network_costs import TABLE, table_text


def compute(models: Sequence[str]) -> dict[str, list[float]]:
    """The entries of these models."""
    entries: dict[str, list[float]] = {}
    for name in models:
        of_model = table_entries(find_model_spec(name))
        print(f"{name}: {len(of_model)} entries", flush=True)
        entries |= of_model
    return entries


if __name__ == "__main__":
    TABLE.write_text(table_text(compute(sys.argv[1:] or sorted(registry.entries("model")))), "utf-8")
