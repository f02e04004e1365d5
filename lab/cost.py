"""What a network costs: parameters, multiply-adds and time.

    python -m lab.cost table configs/*.toml            # the table of results/cost.md: two minutes
    python -m lab.cost step configs/quickstart.toml    # training steps, in eight versions
    python -m lab.cost layer configs/quickstart.toml   # steps of one MoE layer alone

The eight versions combine experts in different ways and have everything else in common. Settings
are those of train.py, for instance --batch_size=4 or --compile. No dataset has to be prepared; for
one of your own in bytes, add --vocab_size=257.
"""

import argparse
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from lab.baselines import make_model
from model import GPT, ModelConfig


class Cost(NamedTuple):
    """What a network costs. Multiply-adds are those in matrix products."""

    parameters: int  # all of them
    active: int  # those that a token uses: of every layer K of E experts, and all the rest
    multiply_adds: int  # per token, of a forward pass over block_size tokens


def count_multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Compute module(x), with x (B, T, ...), and count the multiply-adds per token.

    In attention every token counts as one that looks at all T tokens.
    """
    # torch's counter does not see two fast kernels, grouped_mm and the CPU's attention. In float64
    # the first is not used, and MATH computes attention by plain products, which it masks later.
    module = copy.deepcopy(module).to("cpu", torch.float64)
    x = x.cpu().double() if x.is_floating_point() else x.cpu()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // (2 * x.shape[0] * x.shape[1])  # it counts each as two


@functools.cache
def count(config: ModelConfig) -> Cost:
    """Count what a network of this config costs."""
    with torch.device("meta"):  # where tensors have a shape, but no numbers
        parameters, active = train.count_parameters(make_model(config))
    # Layers are alike, so networks with one and with two tell what each further one adds.
    tokens = torch.zeros(1, config.block_size, dtype=torch.long)
    one_layer = count_multiply_adds(make_model(replace(config, n_layer=1)), tokens)
    two_layers = count_multiply_adds(make_model(replace(config, n_layer=2)), tokens)
    multiply_adds = one_layer + (config.n_layer - 1) * (two_layers - one_layer)
    return Cost(parameters, active, multiply_adds)


def read_configs(arguments: list[str]) -> tuple[ModelConfig, train.TrainConfig]:
    """Read both configs, as train.py does, from config files and --key=value."""
    settings = train.parse_settings(arguments)
    config = train.make_config(train.TrainConfig, settings)
    # train.py takes vocab_size from the dataset: 257 if it is in bytes, 50257 if it is in gpt2.
    in_bytes = config.dataset in ("stdlib", "shakespeare")
    settings.setdefault("vocab_size", 257 if in_bytes else 50257)
    return train.make_config(ModelConfig, settings), config


def print_table(arguments: list[str]) -> None:
    """Print the sizes and costs of config files, as results/cost.md has them."""
    settings = [word for word in arguments if word.startswith("--")]
    paths = [word for word in arguments if word not in settings]
    print("| config | n_layer | C | K | E | D | L ", end="")
    print("| parameters | active per token | multiply-adds per token | of which the graph |")
    print("|" + "---|" * 11)
    for path in sorted(paths):
        config, _ = read_configs([path, *settings])
        cost = count(config)
        without_graph = count(replace(config, aggregator="sum"))
        share = 1 - without_graph.multiply_adds / cost.multiply_adds
        cells = [Path(path).stem, config.n_layer, config.n_embd, config.top_k, config.n_expert]
        cells += [config.dag_dim, config.dag_depth]
        cells += [f"{cost.parameters:,}", f"{cost.active:,}", f"{cost.multiply_adds:,}"]
        print("| " + " | ".join(map(str, cells)) + f" | {share:.0%} |")


def make_step(module: nn.Module, x: Tensor, config: train.TrainConfig) -> Callable[[], None]:
    """Make a function that takes a training step: of a GPT on ids x (B, T), an MoE on (B, T, C)."""
    optimizer = train.make_optimizer(module, config.weight_decay)
    network = torch.compile(module) if config.compile else module

    def step() -> None:
        with train.autocast(x.device, config.dtype):
            loss = network(x, x).loss if isinstance(module, GPT) else network(x)[0].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_in_turns(functions: dict[str, Callable], device, rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds that each function takes, in several rounds of one call each."""
    seconds = {name: np.zeros(rounds + 1) for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            torch.get_device_module(device).synchronize()  # a GPU may still be at work
            seconds[name][i] = time.perf_counter() - start
    return {name: values[1:] for name, values in seconds.items()}  # the first round warms up


def measure(what: str, arguments: list[str], repeats: int) -> None:
    """Print what training steps cost in eight versions, of a network or of one MoE layer."""
    base, config = read_configs(arguments)
    base = replace(base, shared_dim=0)
    versions = {}
    for aggregator in ("sum", "series", "mlp", "dense", "coe"):
        if aggregator != "coe" or base.top_k % 2 == 0:  # it has two rounds
            versions[aggregator] = replace(base, aggregator=aggregator)
    versions["shared"] = replace(base, aggregator="sum", shared_dim=base.n_embd // 2)
    versions["dag L=1"] = replace(base, aggregator="dag", dag_depth=1)
    versions["dag L=2"] = replace(base, aggregator="dag", dag_depth=2)

    device = train.choose_device(config.device)
    x = torch.randint(base.vocab_size, (config.batch_size, base.block_size), device=device)
    if what == "layer":
        # Its gradient is wanted, as it is inside a network.
        x = torch.randn(*x.shape, base.n_embd, device=device, requires_grad=True)
    modules = {}
    functions = {}
    for name, model_config in versions.items():
        model = make_model(model_config).to(device)
        modules[name] = model.blocks[0].moe if what == "layer" else model
        functions[name] = make_step(modules[name], x, config)
    # Beside them the peak: one large product, in the precision that all products have.
    n = 8192 if device.type == "cuda" else 2048
    square = torch.randn(n, n, device=device)
    with train.autocast(device, config.dtype):
        square = square @ square
    functions["peak"] = lambda: square @ square
    seconds = time_in_turns(functions, device, repeats)
    peak = n**3 / np.median(seconds["peak"])  # multiply-adds per second

    print(f"{device.type}, {square.dtype}, peak {2 * peak / 1e9:,.0f} GFLOP/s; × is to sum")
    print("          parameters multiply-adds     ×       ms  × (lowest-highest)  tokens/s of peak")
    products_of_sum = count_multiply_adds(modules["sum"], x[:1].detach())
    for name, module in modules.items():
        parameters = sum(weight.numel() for weight in module.parameters())
        products = count_multiply_adds(module, x[:1].detach())
        print(f"{name:8}{parameters:12,}{products:14,}{products / products_of_sum:6.2f}", end="")
        # A machine may be slower in a minute, so ratios are taken within a round.
        ratios = seconds[name] / seconds["sum"]
        spread = f"{np.median(ratios):.2f} ({ratios.min():.2f}-{ratios.max():.2f})"
        median_seconds = np.median(seconds[name])
        speed = config.batch_size * base.block_size / median_seconds
        # Backward, each product has two more, for the gradients of its two factors.
        share = 3 * products * speed / peak
        print(f"{1e3 * median_seconds:9.1f}{spread:>20}{speed:10,.0f}{share:8.0%}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("what", choices=["table", "step", "layer"])
    parser.add_argument("--repeats", type=int, default=5, help="rounds to time (default: 5)")
    args, arguments = parser.parse_known_args(arguments)
    if args.repeats < 1:
        raise SystemExit("error: --repeats must be at least 1")
    if args.what == "table":
        print_table(arguments)
    else:
        measure(args.what, arguments, args.repeats)


if __name__ == "__main__":
    main()
