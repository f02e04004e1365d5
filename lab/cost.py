"""What it costs, side by side in one run: parameters, multiply-adds, time, memory.

python -m lab.cost table configs/*.toml                        # README's table
python -m lab.cost step configs/quickstart.toml                # a step with eight aggregators
python -m lab.cost layer --dtype=bfloat16 --n_expert=64        # one feed-forward layer alone
python -m lab.cost parts configs/quickstart.toml               # where a depth's time goes
python -m lab.cost sample out/quickstart                       # with a cache against without

--block_size is the number of the layer's tokens.
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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from lab.shared import load_model
from model import GPT, NORM_EPS, DAGLayer, ModelConfig, pairwise
from prepare import UserError, get_encoding, open_dataset, run

Row = tuple[Callable[[], None], int, int, int]  # a step; its tokens; parameters; multiply-adds
LAYER = {
    "n_layer": 1,
    "block_size": 8192,
    "n_embd": 512,
    "n_head": 8,
    "n_expert": 16,
    "expert_dim": 512,
}
LAYERS = {
    "dense": {"aggregator": "dense"},
    "sum": {"aggregator": "sum"},
    "dag D=64": {"aggregator": "dag", "dag_depth": 1, "dag_dim": 64},
    "dag D=128": {"aggregator": "dag", "dag_depth": 2, "dag_dim": 128},
}
HEADER = f"{'parameters':>29}{'multiply-adds':>15}     ×       ms         × (spread)"
HEADER += "  tokens/s  of peak  peak MB"


def cost(model: GPT) -> dict[str, int]:
    """Count by formula what a model costs.

    parameters: all there are.
    active: those that a token uses, namely K of E experts and all else, embeddings whole.
    multiply_adds: those of all matrix products of a forward pass, per token of a full window of
    block_size tokens, in which every token looks at all others.
    aggregator: those of them that combine the experts' outputs, with matrices that work on K nodes.
    """
    config = model.config
    parameters = 0
    active = 0
    aggregator = 0
    # Attention multiplies queries with keys, and the weights that come out with values.
    multiply_adds = 2 * config.n_layer * config.block_size * config.n_embd
    for name, weight in model.named_parameters():
        used = weight.numel()
        if ".experts." in name:
            used = used * config.top_k // config.n_expert
        parameters += weight.numel()
        active += used
        is_looked_up = weight is model.embed.weight and not config.tie_embeddings
        if weight.dim() > 1 and not is_looked_up:
            products = used * config.top_k if ".aggregate.layers." in name else used
            multiply_adds += products
            if ".aggregate." in name:
                aggregator += products
    return {
        "parameters": parameters,
        "active": active,
        "multiply_adds": multiply_adds,
        "aggregator": aggregator,
    }


def count_multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Count what `cost` has a formula for: multiply-adds per token in module(x), x (B, T, ...)."""
    # torch's counter knows neither grouped_mm nor the CPU's attention: hence float64, in which the
    # former is not used, and attention in its plain form.
    module = copy.deepcopy(module).to("cpu", torch.float64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(x)
    return counter.get_total_flops() // (2 * x.shape[0] * x.shape[1])


def time_in_turns(functions: dict[str, Callable], device, repeats: int) -> dict[str, list[float]]:
    """Return the seconds that each function takes each time.

    They take turns, because machines are noisy. The first round warms up and is left out.
    """
    seconds = {name: [] for name in functions}
    for _ in tqdm(range(repeats + 1), leave=False, unit="round"):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            torch.get_device_module(device).synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(values: list[float], others: list[float]) -> str:
    """Describe the ratios of neighbours: their median, and from where to where they go."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def peak_megabytes(function: Callable[[], None], device: torch.device) -> float:
    """Return by how much a call exceeds the memory in use before; nan but on CUDA and Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # gives back what was freed and kept
    clear.write_text("5")  # the peak is now what is in use
    before = peak_kilobytes()
    function()
    return (peak_kilobytes() - before) / 1e3


def peak_kilobytes() -> int:
    """Return the peak memory of this process since it was last cleared, on Linux."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def print_costs(rows: dict[str, Row], config: train.TrainConfig, repeats: int) -> None:
    """Time all rows in turn and print them, compared with `sum` and with one large product."""
    device = train.choose_device(config.device)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device)
    with train.autocast(device, config.dtype):
        a = a @ a  # in the precision of all products
    functions = {"peak": lambda: a @ a} | {name: row[0] for name, row in rows.items()}
    seconds = time_in_turns(functions, device, repeats)
    peak = 2 * n**3 / median(seconds["peak"])
    print(f"{device.type}, {a.dtype}, matmul peak {peak / 1e9:,.0f} GFLOP/s; × is to sum\n{HEADER}")
    for name, (step, tokens, parameters, multiply_adds) in rows.items():
        middle = median(seconds[name])
        share = 3 * 2 * multiply_adds * tokens / middle / peak  # backward is two forward passes
        relative = multiply_adds / rows["sum"][3]
        counts = f"{parameters:13,}{multiply_adds:15,}{relative:6.2f}{middle * 1e3:9.1f}"
        speed = f"{ratio(seconds[name], seconds['sum']):>19}{tokens / middle:10,.0f}{share:9.0%}"
        print(f"{name:16}{counts}{speed}{peak_megabytes(step, device):9.0f}")


def step_row(model_config: ModelConfig, config: train.TrainConfig) -> Row:
    """Make the row of a whole training step."""
    device = train.choose_device(config.device)
    model = GPT(model_config).to(device)
    optimizer = train.make_optimizer(model, config.weight_decay)
    network = torch.compile(model) if config.compile else model
    shape = (config.batch_size, model_config.block_size + 1)
    tokens = torch.randint(model_config.vocab_size, shape, device=device)

    def step() -> None:
        with train.autocast(device, config.dtype):
            out = network(tokens[:, :-1], tokens[:, 1:])
        router_loss = config.balance_coef * out.balance_loss + config.z_coef * out.z_loss
        (out.loss + router_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    counted = cost(model)
    step_tokens = config.batch_size * model_config.block_size
    return step, step_tokens, counted["parameters"], counted["multiply_adds"]


def layer_row(model_config: ModelConfig, config: train.TrainConfig) -> Row:
    """Make the row of the feed-forward half of a block alone, forward and backward."""
    device = train.choose_device(config.device)
    layer = GPT(model_config).blocks[0].moe.to(device)
    network = torch.compile(layer) if config.compile else layer
    h = torch.randn(1, model_config.block_size, model_config.n_embd, device=device)
    h.requires_grad_()

    def step() -> None:
        with train.autocast(device, config.dtype):
            out, _ = network(h)
        torch.autograd.grad(out, [h, *layer.parameters()], torch.ones_like(out))

    parameters = sum(weight.numel() for weight in layer.parameters())
    multiply_adds = count_multiply_adds(layer, h[:, :1].detach().cpu().double())
    return step, model_config.block_size, parameters, multiply_adds


def count_forward(config: ModelConfig) -> int:
    """Count the multiply-adds per token of a forward pass over a full window.

    Layers are alike, so that models of one layer and of two tell what each further one adds.
    """
    tokens = torch.zeros(1, config.block_size, dtype=torch.long)
    one, two = [count_multiply_adds(GPT(replace(config, n_layer=n)), tokens) for n in (1, 2)]
    return one + (config.n_layer - 1) * (two - one)


def print_table(args: argparse.Namespace, paths: list[str]) -> None:
    """Print sizes and costs of configs, as README has them."""
    columns = ["config", "n_layer", "C", "K", "E", "D", "L"]
    columns += ["parameters", "active per token", "products per token", "the graph's"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for path in sorted(paths):
        settings = train.read_settings([path])
        # Where no config sets it, it is that of the dataset's encoding.
        in_bytes = settings["dataset"] in ("stdlib", "shakespeare")
        settings = {"vocab_size": 257 if in_bytes else 50257} | settings
        config = train.make_config(ModelConfig, settings)
        with torch.device("meta"):
            counted = cost(GPT(config))
        products = count_forward(config)
        graph = products - count_forward(replace(config, aggregator="sum"))
        sizes = [config.n_layer, config.n_embd, config.top_k, config.n_expert]
        cells = [Path(path).stem, *sizes, config.dag_dim, config.dag_depth]
        cells += [f"{counted['parameters']:,}", f"{counted['active']:,}"]
        cells += [f"{products:,}", f"{graph / products:.0%}"]
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


def measure_step(args: argparse.Namespace, arguments: list[str]) -> None:
    """Print what a training step costs with the comparison's aggregators, all else equal."""
    settings = train.read_settings(arguments)
    config = train.make_config(train.TrainConfig, settings)
    meta, _, _ = open_dataset(config.dataset)
    settings = {"vocab_size": meta["vocab_size"]} | settings  # as in training
    base = train.make_config(ModelConfig, settings | {"shared_dim": 0})
    names = ["sum", "series", "mlp", "dense"]
    if base.top_k % 2 == 0:
        names.append("coe")
    configs = {name: replace(base, aggregator=name) for name in names}
    configs["shared"] = replace(base, aggregator="sum", shared_dim=base.n_embd // 2)
    configs["dag L=1"] = replace(base, aggregator="dag", dag_depth=1)
    configs["dag L=2"] = replace(base, aggregator="dag", dag_depth=2)
    rows = {name: step_row(each, config) for name, each in configs.items()}
    print_costs(rows, config, args.repeats)


def time_part(function: Callable, *inputs: Tensor) -> float:
    """Return the milliseconds of processor time that a call takes, forward and backward."""
    milliseconds = []
    for _ in range(60):
        copies = [x.detach().clone().requires_grad_() for x in inputs]
        start = time.process_time()
        result = function(*copies)
        result.backward(torch.ones_like(result))
        milliseconds.append(1e3 * (time.process_time() - start))
    return median(milliseconds)


def measure_parts(args: argparse.Namespace, arguments: list[str]) -> None:
    """Print where the time of one depth of the graph goes, on one thread, for 1,024 tokens."""
    torch.set_num_threads(1)
    config = train.make_config(ModelConfig, train.read_settings(arguments))
    layer = DAGLayer(config)
    S, K, C, D = 1024, config.top_k, config.n_embd, config.dag_dim
    node = torch.randn(S, K, C)
    z = torch.randn(S, K, D)
    edge = torch.randn(S, K, K, D)

    def down(node: Tensor) -> Tensor:
        rms = (node.square().mean(dim=-1, keepdim=True) + NORM_EPS).sqrt()
        return F.linear(node, layer.w_down.weight * layer.norm.weight) / rms

    parts = {
        "w_down and its norm": time_part(down, node),
        "pairwise, twice": 2 * time_part(lambda z: pairwise(layer.w_edge, z), z),
        "gates, messages, their sum": time_part(
            lambda e, m: (layer.sigma(e) * m).sum(dim=2), edge, edge
        ),
        "w_up and the addition": time_part(lambda n, z: n + layer.w_up(z), node, z),
        "a whole depth": time_part(layer, node),
    }
    for name, milliseconds in parts.items():
        print(f"{name:28}{milliseconds:6.1f} ms")


def measure_layer(args: argparse.Namespace, arguments: list[str]) -> None:
    """Print what one feed-forward layer costs with two graphs, without one, without experts."""
    settings = LAYER | train.read_settings(arguments)
    config = train.make_config(train.TrainConfig, settings)
    base = train.make_config(ModelConfig, settings)
    rows = {name: layer_row(replace(base, **changes), config) for name, changes in LAYERS.items()}
    print_costs(rows, config, args.repeats)


def measure_sample(args: argparse.Namespace, paths: list[str]) -> None:
    """Print the speed of greedy sampling: of one text without cache and with it, of 16 with it."""
    if len(paths) != 1:
        raise UserError(f"give a run's folder, and of options only those in --help; got {paths}")
    device = train.choose_device("auto")
    model, checkpoint = load_model(Path(paths[0]), device)
    end_of_text = get_encoding(checkpoint["data"]["encoding"]).eot_token
    start = torch.full((16, 1), end_of_text, device=device)

    def cached(texts: int) -> None:
        list(model.generate(start[:texts], args.new_tokens, temperature=0.0))

    def uncached() -> None:
        tokens = start[:1]
        for _ in range(args.new_tokens):  # reading all of the context anew
            next_token = next(model.generate(tokens, 1, temperature=0.0))
            tokens = torch.cat([tokens, next_token[:, None]], dim=1)

    ways = {
        "uncached": uncached,
        "cached": lambda: cached(1),
        "cached, 16 texts": lambda: cached(16),
    }
    with train.autocast(device):
        seconds = time_in_turns(ways, device, args.repeats)
    sizes = f"{args.new_tokens} new tokens, block_size {model.config.block_size}"
    print(f"{sizes}, {device.type}; × is to uncached")
    for name, values in seconds.items():
        texts = 16 if "16" in name else 1
        each = [value / texts for value in values]
        speed = f"{args.new_tokens / median(each):10,.0f} tokens/s"
        print(f"{name:18}{speed}{ratio(seconds['uncached'], each):>22} ×")


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    measures = {
        "table": print_table,
        "step": measure_step,
        "layer": measure_layer,
        "parts": measure_parts,
        "sample": measure_sample,
    }
    parser.add_argument("what", choices=measures)
    parser.add_argument("--new_tokens", type=int, default=512, help="sample: default 512 per text")
    parser.add_argument("--repeats", type=int, default=5, help="times that each runs (default: 5)")
    args, arguments = parser.parse_known_args()
    if min(args.repeats, args.new_tokens) < 1:
        raise UserError("--repeats and --new_tokens must be at least 1")
    measures[args.what](args, arguments)


if __name__ == "__main__":
    run(main)
