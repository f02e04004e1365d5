"""Write text with a trained model.

    python sample.py out/NAME --prompt "def main("
    python sample.py out/NAME --prompt "def main(" --prompt "class " --num_samples 4

The checkpoint holds all that is needed: weights, shape of the model, name of the encoding.
"""

import argparse
import codecs
import sys
from pathlib import Path

import torch

from model import GPT, ModelConfig
from prepare import END_OF_TEXT, UserError, get_encoding, run
from train import autocast, choose_device, load_checkpoint, make_config

AT_ONCE = 64  # texts that grow together; more could exceed the memory
# Control characters could steer a terminal. White space is harmless.
HARMFUL = {*range(0x20), *range(0x7F, 0xA0)} - {ord(character) for character in "\t\n\r\f"}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("path", type=Path, help="the folder of a run, or a checkpoint file")
    add("--prompt", action="append", default=[], help="text to continue; may be given often")
    add("--prompt_file", type=Path, help="file with a text to continue")
    add("--num_samples", type=int, default=1, help="texts per prompt (default: 1)")
    add("--max_new_tokens", type=int, default=200, help="longest text (default: 200)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    add("--top_k", type=int, help="choose among the K likeliest tokens only")
    add("--top_p", type=float, help="choose among the likeliest that add up to P only")
    add("--stop", default="", help="a text ends in front of this")
    add("--seed", type=int, default=1337, help="another seed, another text (default: 1337)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args(arguments)
    for name in ("num_samples", "max_new_tokens", "top_k"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if not 0 <= args.temperature < float("inf") or not 0 <= args.seed < 2**63:
        raise UserError("--temperature and --seed must be 0 or more, and finite")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise UserError("--top_p must be above 0 and at most 1")
    return args


def find_known_ids(encoding, vocab_size: int) -> torch.Tensor:
    """Return a mask (vocab_size) of the ids that stand for text; some encodings have gaps."""
    ids = [encoding.encode_single_token(token) for token in encoding.token_byte_values()]
    known = torch.zeros(vocab_size, dtype=torch.bool)
    known[[*ids, encoding.eot_token]] = True
    return known


def grow_texts(steps, count: int, encoding, stop: bytes):
    """Yield the parts of `count` texts as they come: the number of a text, and some bytes of it.

    `steps` are those of GPT.generate. A text ends at <|endoftext|>, or in front of `stop`.
    """
    held = [b""] * count  # what was not yielded yet, because `stop` may have begun in it
    growing = list(range(count))
    for ids in steps:
        for i, token in enumerate(ids.tolist()):
            if i not in growing:
                continue
            is_end = token == encoding.eot_token
            if not is_end:
                held[i] += encoding.decode_single_token_bytes(token)
            if stop and stop in held[i]:
                is_end = True
                held[i] = held[i].partition(stop)[0]
            if is_end:
                growing.remove(i)
            ready = len(held[i]) if is_end else max(0, len(held[i]) + 1 - max(1, len(stop)))
            yield i, held[i][:ready]
            held[i] = held[i][ready:]
        if not growing:
            break
    yield from enumerate(held)


def write(data: bytes, decoder: codecs.IncrementalDecoder) -> None:
    """Write a part of a text: to a file or pipe as it is, to a terminal without control codes."""
    if sys.stdout.isatty():
        # A character may be made of several tokens, and waits in the decoder for the last of them.
        print(decoder.decode(data).translate(dict.fromkeys(HARMFUL, "?")), end="", flush=True)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prompts = list(args.prompt)
    if args.prompt_file:
        try:
            prompts.append(args.prompt_file.expanduser().read_bytes().decode())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {args.prompt_file} as UTF-8 text: {error}") from error
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.path)
    encoding = get_encoding(checkpoint["data"]["encoding"])
    model = GPT(make_config(ModelConfig, checkpoint["model_config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    known = find_known_ids(encoding, model.config.vocab_size).to(device)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    for prompt in prompts or [""]:
        # As in nanoGPT, <|endoftext|> in a prompt is the token itself: a document begins after it.
        tokens = encoding.encode(prompt, allowed_special={END_OF_TEXT}, disallowed_special=())
        # Each prompt starts from the seed, so its texts do not depend on the prompts before it.
        sampling["generator"] = torch.Generator(device).manual_seed(args.seed)
        for first in range(0, args.num_samples, AT_ONCE):
            count = min(AT_ONCE, args.num_samples - first)
            rows = torch.tensor([tokens or [encoding.eot_token]] * count, device=device)
            steps = model.generate(rows, args.max_new_tokens, known, **sampling)
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            texts = [prompt.encode()] * count
            if args.num_samples == 1:
                write(texts[0], decoder)
            with autocast(device):
                for i, part in grow_texts(steps, count, encoding, args.stop.encode()):
                    texts[i] += part
                    if args.num_samples == 1:
                        write(part, decoder)
            for i, text in enumerate(texts):
                if args.num_samples > 1:  # they have grown together, and are written now
                    decoder.reset()
                    print(f"--- sample {first + i + 1} of {args.num_samples} ---")
                    write(text, decoder)
                print()


if __name__ == "__main__":
    run(main)
