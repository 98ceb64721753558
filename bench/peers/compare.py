"""Runs the same Mamba-2 training step, and decoding, by Headwater and by its peers in turn, and prints the ratios.

    python3 bench/peers/compare.py --headwater build/release/headwater --threads 2 --size A --json compare.json

Each measurement is a process of its own. First each peer variant is tried once at each chunk length and keeps its
fastest; then all variants and Headwater run in turn, --repeats times, and the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MIB = 2**20
TIMEOUT_SECONDS = 1200

Result = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A peer and how it runs."""

    peer: str
    compiled: bool

    @property
    def name(self) -> str:
        return f"{self.peer}, {'torch.compile' if self.compiled else 'eager'}"


VARIANTS = [Variant(peer, compiled) for peer in ("transformers", "listing") for compiled in (False, True)]


def run_json(command: list[str], threads: int) -> Result | None:
    """The JSON object in the last line that a command prints; None, with a note, if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"took longer than {TIMEOUT_SECONDS} s: {' '.join(command)}", file=sys.stderr)
        return None
    if done.returncode != 0:
        print(f"failed ({done.returncode}): {' '.join(command)}\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_peer(variant: Variant, size: str, chunk: int, args: argparse.Namespace, decode: bool = False) -> Result | None:
    command = [sys.executable, str(HERE / "peer.py"), "--peer", variant.peer, "--size", size, "--chunk", str(chunk),
               "--threads", str(args.threads), "--seconds", str(args.seconds)]
    result = run_json(command + ["--compile"] * variant.compiled + ["--decode"] * decode, args.threads)
    return result and {**result, "chunk": chunk}


def run_headwater(size: str, args: argparse.Namespace, decode: bool = False) -> Result | None:
    command = [args.headwater, "bench", "--model", str(HERE / f"size_{size}.yaml"), "--json"]
    return run_json(command + ["--decode"] * decode, args.threads)


def fastest(results: list[Result]) -> Result:
    return max(results, key=lambda r: r["tokens_per_second"])


def medians(results: list[Result]) -> Result:
    """Key by key medians of the numbers; of anything else, the first value."""
    return {key: statistics.median(r[key] for r in results) if isinstance(value, int | float) else value
            for key, value in results[0].items()}


def compare(size: str, args: argparse.Namespace, decode: bool) -> Result:
    """The medians of every variant at one size, and the trials that chose the chunk lengths."""
    if decode:
        variants = [v for v in VARIANTS if v.peer == "transformers"]
        chunks = dict.fromkeys(variants, 64)  # decoding uses the recurrence; only the prompt is chunked
        trials: list[Result] = []
    else:
        variants, chunks, trials = VARIANTS, {}, []
        for variant in variants:
            found = [r for c in args.chunks if (r := run_peer(variant, size, c, args))]
            trials += [{"variant": variant.name, **r} for r in found]
            if found:
                chunks[variant] = fastest(found)["chunk"]
            progress(f"size {size}, {variant.name}: "
                     + ", ".join(f"chunk {r['chunk']} {r['tokens_per_second']:.0f} tokens/s" for r in found))

    collected: dict[str, list[Result]] = {}
    for repeat in range(args.repeats):
        for variant, chunk in chunks.items():
            if r := run_peer(variant, size, chunk, args, decode):
                collected.setdefault(variant.name, []).append(r)
        if args.headwater and (r := run_headwater(size, args, decode)):
            collected.setdefault("headwater", []).append(r)
        progress(f"size {size}, {'decoding' if decode else 'training'}: round {repeat + 1} of {args.repeats}")
    return {"size": size, "what": "decoding" if decode else "training", "trials": trials, "runs": collected,
            "medians": {name: medians(results) for name, results in collected.items()}}


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def peak(result: Result) -> float | None:
    """Peak memory as compared: a peer's growth of resident memory after its imports, Headwater's whole process."""
    return result.get("peak_rss_bytes", result.get("peak_bytes"))


def print_table(comparison: Result) -> None:
    """Prints the table and adds the ratios to the comparison."""
    rows: dict[str, Result] = comparison["medians"]
    peers = {name: r for name, r in rows.items() if name != "headwater"}
    ours = rows.get("headwater")
    print(f"\nSize {comparison['size']}, {comparison['what']}\n")
    print("| variant | chunk | tokens/s | peak MiB | ours / its tokens/s | our / its memory | others' cores |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        speed = f"{ours['tokens_per_second'] / row['tokens_per_second']:.2f}" if ours and row is not ours else ""
        bytes_, our_bytes = peak(row), ours and peak(ours)
        memory = f"{our_bytes / bytes_:.2f}" if our_bytes and bytes_ and row is not ours else ""
        mib = f"{bytes_ / MIB:.0f}" if bytes_ else ""
        chunk = row.get("chunk", "") if comparison["what"] == "training" else ""
        others = f"{row['others_cores']:.2f}" if "others_cores" in row else ""
        print(f"| {name} | {chunk} | {row['tokens_per_second']:.0f} | {mib} | {speed} | {memory} | {others} |")
    if not ours or not peers:
        return
    name, best = max(peers.items(), key=lambda item: item[1]["tokens_per_second"])
    ratios = {"fastest_peer": name, "tokens_per_second": ours["tokens_per_second"] / best["tokens_per_second"]}
    if comparison["what"] == "training" and peak(ours):
        ratios["memory"] = peak(ours) / peak(best)
        ratios["memory_of_smallest_peer"] = peak(ours) / min(peak(r) for r in peers.values())
        if "peak_bytes" in ours:
            ratios["memory_by_allocator"] = ours["peak_bytes"] / peak(best)
    comparison["ratios"] = ratios
    print("\nours / fastest peer: " + ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"({v})"
                                                for k, v in ratios.items()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headwater", help="our program; without it only the peers are measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=["A", "B"], help="one size only (default: both)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 64, 128, 256], help="chunk lengths to try")
    parser.add_argument("--repeats", type=int, default=3, help="rounds through all variants")
    parser.add_argument("--seconds", type=float, default=15, help="measured time of one run of a peer")
    parser.add_argument("--no-decode", action="store_true", help="leave out decoding")
    parser.add_argument("--quick", action="store_true", help="chunk 64 only, one round, 5 s a run: rough numbers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here")
    args = parser.parse_args()
    if args.quick:
        args.chunks, args.repeats, args.seconds = [64], 1, 5.0
    if args.headwater and not Path(args.headwater).is_file():
        parser.error(f"--headwater: there is no file {args.headwater}")
    if args.headwater:
        args.headwater = str(Path(args.headwater).resolve())
    return args


def main() -> int:
    args = parse_arguments()
    comparisons = [compare(size, args, decode)
                   for size in ([args.size] if args.size else ["A", "B"])
                   for decode in ([False] if args.no_decode else [False, True])]
    for comparison in comparisons:
        print_table(comparison)
    if args.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                   "threads": args.threads, "load": os.getloadavg()}
        args.json.write_text(json.dumps({"machine": machine, "comparisons": comparisons}, indent=2) + "\n")
    complete = all(c["medians"] and (not args.headwater or "headwater" in c["medians"]) for c in comparisons)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
