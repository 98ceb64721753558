"""Measures one peer in this process and prints one JSON line: a training step, or decoding at batch 1.

compare.py starts it once for each measurement, so that memory is that of one variant alone. By hand:

    python3 bench/peers/peer.py --peer listing --size A --chunk 64 --compile
    python3 bench/peers/peer.py --peer transformers --size B --decode
    python3 bench/peers/peer.py --check                # both peers compute the same function
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["transformers", "listing"], default="listing")
    parser.add_argument("--size", choices=["A", "B"], default="A")
    parser.add_argument("--chunk", type=int, default=64, help="chunk length of the SSD")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model and the loss")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15, help="time spent measuring, after warm-up")
    parser.add_argument("--decode", action="store_true", help="decode at batch 1 instead of training")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of one decoding run")
    parser.add_argument("--check", action="store_true", help="compare the two peers' logits and gradients, then exit")
    return parser.parse_args()


ARGUMENTS = parse_arguments()
os.environ["OMP_NUM_THREADS"] = str(ARGUMENTS.threads)  # before torch starts its threads

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import Mamba2Config, Mamba2ForCausalLM  # noqa: E402

from listing import ListingLM, Size  # noqa: E402

WARM_UP_STEPS = 3
MIN_STEPS = 5
PROMPT_TOKENS = 16


def read_size(name: str) -> tuple[Size, int, int]:
    """The model, the length and the batch of size_<name>.yaml, the file that `headwater bench` reads too."""
    config = yaml.safe_load((Path(__file__).parent / f"size_{name}.yaml").read_text())
    model, mixer = config["model"], config["model"]["mixer"]
    assert model["tie_embeddings"] and mixer["type"] == "mamba2" and mixer["n_groups"] == 1
    size = Size(*(model[k] for k in ("vocab_size", "d_model", "n_layers")),
                *(mixer[k] for k in ("d_state", "head_dim", "expand", "d_conv")))
    return size, config["data"]["length"], config["train"]["batch"]


def transformers_model(size: Size, chunk: int) -> Mamba2ForCausalLM:
    """The transformers package's model; without a GPU's kernels it takes its pure torch path."""
    config = Mamba2Config(
        vocab_size=size.vocab_size, hidden_size=size.d_model, num_hidden_layers=size.n_layers,
        state_size=size.d_state, head_dim=size.head_dim, num_heads=size.n_heads, expand=size.expand,
        conv_kernel=size.d_conv, n_groups=1, chunk_size=chunk, initializer_range=0.02, tie_word_embeddings=True,
        pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return Mamba2ForCausalLM(config)


def build(peer: str, size: Size, chunk: int) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A peer's model and its function from tokens to logits."""
    torch.manual_seed(0)
    if peer == "listing":
        model: nn.Module = ListingLM(size, chunk)
        return model, model
    model = transformers_model(size, chunk)
    return model, lambda tokens: model(tokens, use_cache=False).logits


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS (now) or VmHWM (peak since the last reset_peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Makes VmHWM the resident size of now."""
    Path("/proc/self/clear_refs").write_text("5")


class OtherLoad:
    """How many cores other processes kept busy between its making and `cores()`: above 0.2, distrust the timing."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        """Wall seconds, and core seconds that the machine was busy with anything but this process."""
        fields = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]  # all but idle and waiting for the disk
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK") - time.process_time()

    def cores(self) -> float:
        wall, busy = (now - then for now, then in zip(self._now(), self.start, strict=True))
        return max(0.0, busy / wall)


def measure_training(args: argparse.Namespace) -> dict[str, float]:
    """Forward, cross entropy, backward, clipping and AdamW on random tokens."""
    size, length, batch = read_size(args.size)
    reset_peak()
    before = memory("VmRSS")

    model, logits_of = build(args.peer, size, args.chunk)
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=True)
    data = torch.randint(size.vocab_size, (batch, length + 1))
    tokens, targets = data[:, :-1].contiguous(), data[:, 1:].contiguous()

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(tokens).flatten(0, 1), targets.flatten())

    if args.compile:
        loss_of = torch.compile(loss_of, fullgraph=True, dynamic=False)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert loss.isfinite()
        return time.perf_counter() - start

    for _ in range(WARM_UP_STEPS):
        step()
    peak_with_warm_up = memory("VmHWM")
    reset_peak()
    others, seconds = OtherLoad(), list[float]()
    while len(seconds) < MIN_STEPS or sum(seconds) < args.seconds:
        seconds.append(step())

    median = statistics.median(seconds)
    return {
        "tokens_per_second": batch * length / median, "step_ms": 1e3 * median, "fastest_step_ms": 1e3 * min(seconds),
        "steps": len(seconds), "others_cores": others.cores(), "parameters": sum(p.numel() for p in parameters),
        # From before the model is built; the second leaves out warm-up, thus what the compiler itself needs.
        "peak_bytes_with_warm_up": max(peak_with_warm_up, memory("VmHWM")) - before,
        "peak_bytes": memory("VmHWM") - before,
    }


def measure_decoding(args: argparse.Namespace) -> dict[str, float]:
    """Greedy decoding at batch 1 by the transformers model with its cache, called directly (no `generate` overhead)."""
    size, _, _ = read_size(args.size)
    reset_peak()
    before = memory("VmRSS")
    torch.manual_seed(0)
    model = transformers_model(size, args.chunk).eval()
    prompt = torch.randint(size.vocab_size, (1, PROMPT_TOKENS))
    forward = torch.compile(model, dynamic=False) if args.compile else model

    @torch.inference_mode()
    def decode() -> float:
        """Seconds for args.tokens tokens after the prompt."""
        out = model(prompt, use_cache=True)
        cache, token = out.cache_params, out.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(args.tokens):
            token = forward(token, cache_params=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    decode()
    others, seconds = OtherLoad(), list[float]()
    while len(seconds) < MIN_STEPS or sum(seconds) < args.seconds:
        seconds.append(decode())
    median = statistics.median(seconds)
    return {"tokens_per_second": args.tokens / median, "token_ms": 1e3 * median / args.tokens, "runs": len(seconds),
            "others_cores": others.cores(), "peak_bytes": memory("VmHWM") - before}


def check() -> dict[str, float]:
    """Worst differences between the two peers with the same weights, relative to the largest value of each tensor."""
    size = Size(vocab_size=64, d_model=32, n_layers=2, d_state=16, head_dim=8, expand=2, d_conv=4)
    theirs, their_logits = build("transformers", size, 16)
    ours, our_logits = build("listing", size, 32)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k != "lm_head.weight"})
    tokens = torch.randint(size.vocab_size, (2, 96))
    expected, got = their_logits(tokens), our_logits(tokens)
    for logits in (expected, got):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()

    def difference(a: Tensor, b: Tensor) -> float:
        return float(((a - b).abs().max() / b.abs().max()).detach())

    gradients = dict(theirs.named_parameters())
    worst = {"logits": difference(got, expected),
             "gradients": max(difference(p.grad, gradients[name].grad) for name, p in ours.named_parameters())}
    assert max(worst.values()) < 1e-3, worst
    return worst


def main() -> None:
    torch.set_num_threads(ARGUMENTS.threads)
    if ARGUMENTS.check:
        result = check()
    elif ARGUMENTS.decode:
        result = measure_decoding(ARGUMENTS)
    else:
        result = measure_training(ARGUMENTS)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**result, **versions}))


if __name__ == "__main__":
    main()
