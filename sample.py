"""Write text with a trained model: python sample.py out/NAME --prompt "def main("

Needs nothing but the checkpoint: it holds the model's configuration and the name of its encoding.
"""

import argparse
import codecs
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from model import GPT, ModelConfig
from prepare import Parser, UserError, get_encoding, read_text, run

CHECKPOINT_TYPES = {  # what train.py writes
    "model": dict, "optimizer": dict, "model_config": dict, "train_config": dict, "encoding": str, "data": dict,
    "version": str, "step": int, "log": list, "loss_sum": float, "loss_steps": int, "grad_norm": float | None,
}  # fmt: skip


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else MPS (Apple), else the CPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"device {name!r} can't be used here ({reason}); try cpu") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} can't be used here; choose auto, cpu, cuda or mps")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of matrix products: "auto" is bfloat16 on a CUDA device that has it, else float32. Raises UserError."""
    if name == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float32
    if name == "float16":
        raise UserError(
            "dtype float16 is refused: its gradients underflow without loss scaling; use bfloat16, or float32 where "
            "the device has no bfloat16"
        )
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype must be auto, float32 or bfloat16, got {name!r}")
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Weights stay in float32; in this context, which can be entered again and again, products are in `dtype`."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def checkpoint_path(path: Path) -> Path:
    """A run's folder stands for its best.pt."""
    return path / "best.pt" if path.is_dir() else path


def load_checkpoint(path: Path) -> dict:
    """Contents of a checkpoint that train.py wrote, on the CPU. Raises UserError if it is missing or damaged."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; train a model first, for example: python train.py configs/quickstart.toml"
        )
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if archive.testzip():  # torch.load does not compare the checksums that torch.save wrote
                raise ValueError("checksum")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch stumbles over: the file is not what train.py wrote
        raise UserError(f"{path} is damaged or not a checkpoint of train.py ({type(error).__name__})") from error
    for key, kind in CHECKPOINT_TYPES.items():
        if not isinstance(checkpoint, dict) or key not in checkpoint or not isinstance(checkpoint[key], kind):
            raise UserError(f"{path} is not a checkpoint of train.py: {key!r} is missing or of another type")
    return checkpoint


def load_model(path: Path, device: torch.device) -> tuple[GPT, dict]:
    """The model of a checkpoint, in evaluation mode, and the whole checkpoint. Raises UserError."""
    checkpoint = load_checkpoint(path)
    try:
        model = GPT(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit this version of model.py ({str(error).splitlines()[-1].strip()})"
        ) from error
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UserError(f"{path} holds weights that are not finite: the run diverged; use an earlier checkpoint")
    if get_encoding(checkpoint["encoding"]).n_vocab > model.config.vocab_size:
        raise UserError(f"{path} is damaged: its {checkpoint['encoding']} encoding has more ids than its model")
    return model.to(device).eval(), checkpoint


def continue_text(
    model: GPT, encoding_name: str, prompt: str, max_new_tokens: int, **choice: float | torch.Generator | None
) -> Iterator[str]:
    """Yield text that continues `prompt` (a new document if it is empty) as it is generated, up to <|endoftext|>.

    `choice` is what GPT.generate takes: temperature, top_k, top_p, generator. A character whose bytes span several
    tokens is held back until it is whole.
    """
    encoding = get_encoding(encoding_name)
    tokens = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    device = model.embed.weight.device
    tokens = torch.tensor([tokens], device=device)
    for token in model.generate(tokens, max_new_tokens, n_token=encoding.n_vocab, **choice):
        if token.item() == encoding.eot_token:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token.item()))
    yield decoder.decode(b"", final=True)


def main() -> None:
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path", type=Path, metavar="out/NAME", help="a run's folder (its best.pt), or a checkpoint file"
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text to continue (default: none, a new document)")
    prompt.add_argument("--prompt-file", type=Path, help="file whose text is continued")
    parser.add_argument("--num-samples", type=int, default=1, help="how many texts to write (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=500, help="longest text, in tokens (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="choose among the K likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest tokens that together reach P only")
    parser.add_argument("--seed", type=int, default=1337, help="another seed, another text (default: 1337)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args()
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.seed >= 2**63:
        raise UserError(f"--seed must be below 2**63, got {args.seed}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError(f"--top-p must lie above 0 and not above 1, got {args.top_p}")

    device = choose_device(args.device)
    model, checkpoint = load_model(checkpoint_path(args.path), device)
    text = read_text(args.prompt_file) if args.prompt_file else args.prompt
    generator = torch.Generator(device).manual_seed(args.seed)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples} ---")
        print(text, end="", flush=True)
        with autocast(device, choose_dtype("auto", device)):
            choice = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, generator=generator)
            for piece in continue_text(model, checkpoint["encoding"], text, args.max_new_tokens, **choice):
                print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    run(main)
