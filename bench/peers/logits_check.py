"""Saves a small random Mamba2ForCausalLM of the transformers package with tokens and its logits, to test a loader on.

    python3 bench/peers/logits_check.py FOLDER

writes FOLDER/config.json and model.safetensors (save_pretrained), tokens.npy (int64, (batch, length)) and
expected.safetensors (tokens, int64; logits, float32, (batch, length, vocab_size)). Its norms, biases, decays and skips
are perturbed so that a loader which drops or swaps any of them is found; the length is no multiple of the chunk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

BATCH, LENGTH = 2, 45


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embedding")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    config = Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=16, head_dim=8, num_heads=8, expand=2,
        conv_kernel=4, n_groups=1, chunk_size=16, tie_word_embeddings=not args.untied,
        pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
        tokens = torch.randint(config.vocab_size, (BATCH, LENGTH))
        logits = model(tokens, use_cache=False).logits

    model.save_pretrained(args.folder)
    np.save(args.folder / "tokens.npy", tokens.numpy())
    save_file({"tokens": tokens, "logits": logits.contiguous()}, args.folder / "expected.safetensors")
    print(f"{args.folder}: logits {tuple(logits.shape)}, largest {logits.abs().max():.4f}")


if __name__ == "__main__":
    main()
