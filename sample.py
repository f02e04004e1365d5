"""Write text with a trained model.

    python sample.py checkpoints/stdlib.pt --prompt "class Node:"
    python sample.py out/tinystories --prompt "<|endoftext|>Once upon a time" --num_samples 3

The first argument is a run's folder (its best.pt is used) or a checkpoint file.
"""

import argparse
import codecs
import os
from pathlib import Path

import tiktoken
import torch

from model import GPT, ModelConfig
from prepare import get_encoding
from train import autocast, choose_device, load_checkpoint, load_weights, make_config


def load_model(path: Path, device: torch.device) -> tuple[GPT, tiktoken.Encoding]:
    """Load a model and its encoding from a checkpoint, or from the folder of a run."""
    checkpoint = load_checkpoint(path)
    model = GPT(make_config(ModelConfig, checkpoint["model_config"]))
    load_weights(model, checkpoint["model"])
    return model.to(device).eval(), get_encoding(checkpoint["data"]["encoding"])


def get_token_bytes(encoding: tiktoken.Encoding) -> dict[int, bytes]:
    """Return the bytes of every id that stands for text: not of <|endoftext|> or an unused id."""
    return {encoding.encode_single_token(b): b for b in encoding.token_byte_values()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", type=Path, help="the folder of a run, or a checkpoint file")
    add("--prompt", default="", help="text to continue (default: none)")
    add("--num_samples", type=int, default=1, help="how many texts to write (default: 1)")
    add("--max_new_tokens", type=int, default=200, help="where a text is cut off (default: 200)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest (default: 0.8)")
    add("--top_k", type=int, help="choose among the K likeliest tokens")
    add("--top_p", type=float, help="choose among the likeliest tokens that add up to P")
    add("--seed", type=int, default=1337, help="change it for other texts (default: 1337)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args(arguments)
    if args.top_k is not None and args.top_k < 1:
        raise SystemExit(f"error: --top_k must be at least 1, got {args.top_k}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise SystemExit(f"error: --top_p must be above 0 and at most 1, got {args.top_p}")

    device = choose_device(args.device)
    amp = autocast(device)
    model, encoding = load_model(args.path, device)
    token_bytes = get_token_bytes(encoding)
    prompt = os.fsencode(args.prompt).decode(errors="replace")  # what is not UTF-8 becomes U+FFFD

    # Every document ends with <|endoftext|>, so the model starts a new one after it. In the prompt
    # it stands for the token, and an empty prompt is this token alone.
    ids = encoding.encode(prompt, allowed_special="all") or [encoding.eot_token]
    tokens = torch.tensor([ids], device=device)  # (1, T)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    torch.manual_seed(args.seed)
    for number in range(1, args.num_samples + 1):
        if args.num_samples > 1:
            print(f"--- sample {number} of {args.num_samples} ---")
        print(prompt, end="")
        # A character can span several tokens: the decoder waits until it is complete.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        with amp:
            for token in model.generate(tokens, args.max_new_tokens, **sampling):
                piece = token_bytes.get(token.item())
                if piece is None:  # the end of the document, or an unused id
                    break
                print(decoder.decode(piece), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
