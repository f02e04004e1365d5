"""Write text with a trained model.

python sample.py checkpoints/stdlib.pt --prompt "class Node:"
python sample.py out/tinystories --prompt "<|endoftext|>Once upon a time" --num_samples 3
"""

import argparse
import codecs
import os
from pathlib import Path

import tiktoken
import torch

from model import GPT, ModelConfig
from prepare import get_encoding
from train import autocast, choose_device, choose_dtype, load_checkpoint, make_config


def load_model(path: Path, device: torch.device) -> tuple[GPT, tiktoken.Encoding]:
    """Load a model, and the encoding of its tokens, from a checkpoint or the folder of a run."""
    checkpoint = load_checkpoint(path)
    model = GPT(make_config(ModelConfig, checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval(), get_encoding(checkpoint["data"]["encoding"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("path", type=Path, help="the folder of a run, or a checkpoint file")
    add("--prompt", default="", help="text to continue (default: none)")
    add("--num_samples", type=int, default=1, help="how many texts to write (default: 1)")
    add("--max_new_tokens", type=int, default=200, help="where a text is cut off (default: 200)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest (default: 0.8)")
    add("--top_k", type=int, help="choose among the K likeliest tokens")
    add("--top_p", type=float, help="choose among the likeliest tokens that add up to P")
    add("--seed", type=int, default=1337, help="another seed, other texts (default: 1337)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args(arguments)
    if args.top_k is not None and args.top_k < 1:
        parser.error("--top_k must be at least 1")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")

    device = choose_device(args.device)
    amp = autocast(device, choose_dtype("auto", device))
    model, encoding = load_model(args.path, device)
    text_ids = {encoding.encode_single_token(text) for text in encoding.token_byte_values()}

    # A prompt that is not UTF-8 gets replacement characters. In it, <|endoftext|> is the token
    # itself: a document begins after it, and so without a prompt we start from it.
    prompt = os.fsencode(args.prompt).decode(errors="replace")
    ids = encoding.encode(prompt, allowed_special="all") or [encoding.eot_token]
    tokens = torch.tensor([ids], device=device)  # (1, T)
    torch.manual_seed(args.seed)
    for number in range(1, args.num_samples + 1):
        if args.num_samples > 1:
            print(f"--- sample {number} of {args.num_samples} ---")
        print(prompt, end="")
        # A character may be made of several tokens: the decoder waits for the last of them.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        sampling = (args.max_new_tokens, args.temperature, args.top_k, args.top_p)
        with amp:
            for token in model.generate(tokens, *sampling):
                if token.item() not in text_ids:  # <|endoftext|>, or an id without a text
                    break
                text = decoder.decode(encoding.decode_single_token_bytes(token.item()))
                print(text, end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    main()
