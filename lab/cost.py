"""What it costs, side by side in one run: parameters, multiply-adds, time, memory.

python -m lab.cost step configs/quickstart.toml                   # a training step with eight aggregators
python -m lab.cost layer --dtype=bfloat16 --n_expert=64           # one feed-forward layer; --block_size is its tokens
python -m lab.cost sample out/quickstart                          # sampling with the key/value cache against without
"""

import argparse
import copy
import ctypes
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import lab.baselines  # noqa: F401  the other aggregators
import train
from model import GPT, ModelConfig
from prepare import Parser, get_encoding, open_dataset, require, run

Row = tuple[Callable[[], None], int, int, int]  # a step; its tokens; parameters; multiply-adds per token, forward
LAYER = ["--n_layer=1", "--block_size=8192", "--n_embd=512", "--n_head=8", "--n_expert=16", "--expert_dim=512"]
LAYERS = {"dense": {"aggregator": "dense"}, "sum": {"aggregator": "sum"}}
LAYERS |= {f"dag D={D}": {"aggregator": "dag", "dag_depth": L, "dag_dim": D} for L, D in ((1, 64), (2, 128))}
HEADER = "                   parameters  multiply-adds     ×       ms         × (spread)  tokens/s  of peak  peak MB"


def count_multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Multiply-adds per token of the matrix products in module(x), x (B, T, ...), counted; by formula: GPT.cost()."""
    # torch's counter knows neither grouped_mm nor the CPU's attention: hence float64, and attention in its plain form.
    module = copy.deepcopy(module).to("cpu", torch.float64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // (2 * x.shape[0] * x.shape[1])


def time_in_turns(functions: dict[str, Callable], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, in turns because machines are noisy; the first round warms up and is left out."""
    seconds = {name: [] for name in functions}
    for _ in tqdm(range(repeats + 1), leave=False, unit="round"):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            torch.get_device_module(device).synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(values: list[float], others: list[float]) -> str:
    """Median and spread of the ratios of neighbours."""
    ratios = [a / b for a, b in zip(values, others, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def peak_megabytes(function: Callable[[], None], device: torch.device) -> float:
    """Peak memory above what was in use before, on CUDA devices and on Linux; elsewhere not a number."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, _, after = torch.cuda.memory_allocated(), function(), torch.cuda.max_memory_allocated()
        return (after - before) / 1e6
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed and kept
    clear.write_text("5")  # the peak is now what is in use
    before, _, after = status.read_text(), function(), status.read_text()
    before, after = (int(text.split("VmHWM:")[1].split()[0]) for text in (before, after))  # the peak, in kilobytes
    return (after - before) / 1e3


def print_costs(rows: dict[str, Row], config: train.TrainConfig, repeats: int) -> None:
    """Time all rows in turn and print them, with their ratios to `sum` and to the speed of one large matrix product."""
    device = train.choose_device(config.device)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device)
    with train.autocast(device, config.dtype):
        a = a @ a  # in the precision of all products
    seconds = time_in_turns({"peak": lambda: a @ a} | {name: row[0] for name, row in rows.items()}, device, repeats)
    peak = 2 * n**3 / median(seconds["peak"])
    print(f"{device.type}, {a.dtype}, matmul peak {peak / 1e9:,.0f} GFLOP/s; × is to sum\n{HEADER}")
    for name, (step, tokens, parameters, multiply_adds) in rows.items():
        middle = median(seconds[name])
        share = 3 * 2 * multiply_adds * tokens / middle / peak  # a backward pass is two forward passes
        cost = f"{parameters:13,}{multiply_adds:15,}{multiply_adds / rows['sum'][3]:6.2f}{middle * 1e3:9.1f}"
        speed = f"{ratio(seconds[name], seconds['sum']):>19}{tokens / middle:10,.0f}{share:9.0%}"
        print(f"{name:16}{cost}{speed}{peak_megabytes(step, device):9.0f}")


def step_row(model_config: ModelConfig, config: train.TrainConfig) -> Row:
    """A whole training step."""
    device = train.choose_device(config.device)
    model = GPT(model_config).to(device)
    optimizer, network = train.make_optimizer(model, config), torch.compile(model) if config.compile else model
    tokens = torch.randint(model_config.vocab_size, (config.batch_size, model_config.block_size + 1), device=device)

    def step() -> None:
        train.accumulate_gradients(network, [tokens], config, train.autocast(device, config.dtype))
        optimizer.step()
        optimizer.zero_grad()

    cost = model.cost()
    return step, config.batch_size * model_config.block_size, cost["parameters"], cost["multiply_adds"]


def layer_row(model_config: ModelConfig, config: train.TrainConfig) -> Row:
    """The feed-forward half of a block alone, forward and backward."""
    device = train.choose_device(config.device)
    layer = GPT(model_config).blocks[0].moe.to(device)
    network = torch.compile(layer) if config.compile else layer
    h = torch.randn(1, model_config.block_size, model_config.n_embd, device=device, requires_grad=True)

    def step() -> None:
        with train.autocast(device, config.dtype):
            out, _ = network(h)
        torch.autograd.grad(out, [h, *layer.parameters()], torch.ones_like(out))

    multiply_adds = count_multiply_adds(layer, h[:, :1].detach().cpu().double())
    return step, model_config.block_size, sum(p.numel() for p in layer.parameters()), multiply_adds


def measure_step(args: argparse.Namespace, arguments: list[str]) -> None:
    """Print what a training step costs with the comparison's aggregators, all else equal."""
    settings = train.read_settings(arguments)
    config = train.make_config(train.TrainConfig, settings)
    settings = {"vocab_size": open_dataset(config.dataset).meta["vocab_size"]} | settings  # as in training
    base = train.make_config(ModelConfig, settings | {"shared_dim": 0})
    changes = {name: {"aggregator": name} for name in ("sum", "series", "mlp", "dense")}
    changes |= {"coe": {"aggregator": "coe"}} if base.top_k % 2 == 0 else {}
    changes["shared"] = {"aggregator": "sum", "shared_dim": base.n_embd // 2}
    changes |= {f"dag L={depth}": {"aggregator": "dag", "dag_depth": depth} for depth in (1, 2)}
    print_costs({name: step_row(replace(base, **c), config) for name, c in changes.items()}, config, args.repeats)


def measure_layer(args: argparse.Namespace, arguments: list[str]) -> None:
    """Print what one feed-forward layer costs with two graphs, without one, and without experts."""
    settings = train.read_settings([*LAYER, *arguments])
    config, base = (train.make_config(kind, settings) for kind in (train.TrainConfig, ModelConfig))
    print_costs({name: layer_row(replace(base, **c), config) for name, c in LAYERS.items()}, config, args.repeats)


def measure_sample(args: argparse.Namespace, paths: list[str]) -> None:
    """Print tokens/s of greedy sampling: one text without cache, one with, 16 at once with."""
    require(len(paths) == 1, f"give a run's folder, and of options only those in --help; got {paths}")
    model, checkpoint = train.load_checkpoint(Path(paths[0]))
    device = model.to(train.choose_device("auto")).embed.weight.device
    start = torch.full((16, 1), get_encoding(checkpoint["encoding"]).eot_token, device=device)

    def cached(texts: int) -> None:
        list(model.generate(start[:texts], args.new_tokens, temperature=0.0))

    def uncached() -> None:
        tokens = start[:1]
        for _ in range(args.new_tokens):  # reading all of the context anew
            tokens = torch.cat([tokens, next(model.generate(tokens, 1, temperature=0.0))[:, None]], dim=1)

    ways = {"uncached": uncached, "cached": lambda: cached(1), "cached, 16 texts": lambda: cached(16)}
    with train.autocast(device):
        seconds = time_in_turns(ways, device, args.repeats)
    print(f"{args.new_tokens} new tokens, block_size {model.config.block_size}, {device.type}; × is to uncached")
    for name, values in seconds.items():
        each = [value / (16 if "16" in name else 1) for value in values]
        print(f"{name:18}{args.new_tokens / median(each):10,.0f} tokens/s{ratio(seconds['uncached'], each):>22} ×")


def main() -> None:
    parser = Parser(prog="-m lab.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measures = {"step": measure_step, "layer": measure_layer, "sample": measure_sample}
    parser.add_argument("what", choices=measures)
    parser.add_argument("--new_tokens", type=int, default=512, help="sample: per text (default: 512)")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed (default: 5)")
    args, rest = parser.parse_known_args()
    require(min(args.repeats, args.new_tokens) > 0, "--repeats and --new_tokens must be at least 1")
    measures[args.what](args, rest)


if __name__ == "__main__":
    run(main)
