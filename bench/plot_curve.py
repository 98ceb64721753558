"""Draws the loss of a run over its steps as an SVG: python3 bench/plot_curve.py RUN/metrics.jsonl OUT.svg [TITLE]."""

import json
import math
import sys

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 36, 44
WINDOW = 25  # steps averaged for the drawn line


def read(path: str) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, bits per token) of the training steps, and (step, bits per byte) of the evaluations."""
    steps, evaluations = [], []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if "evaluation" in record:
                evaluations.append((record["step"], record["evaluation"]["bits_per_byte"]))
            elif not record["skipped"]:
                steps.append((record["step"], record["loss"] / math.log(2)))
    return steps, evaluations


def averaged(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    result = []
    for end in range(WINDOW, len(points) + 1, max(1, WINDOW // 5)):
        window = points[end - WINDOW : end]
        result.append((window[-1][0], sum(value for _, value in window) / WINDOW))
    return result


def draw(steps: list[tuple[int, float]], evaluations: list[tuple[int, float]], title: str) -> str:
    line = averaged(steps)
    last_step = steps[-1][0]
    low, high = 1.0, 4.0

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last_step

    def y(bits: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(bits, high)) / (high - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
    ]
    for tick in (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0):
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for part in range(5):
        step = last_step * part / 4
        out.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 24}" text-anchor="middle">{step:.0f}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    points = " ".join(f"{x(step):.1f},{y(bits):.1f}" for step, bits in line)
    out.append(f'<polyline points="{points}" fill="none" stroke="#1f6fb4" stroke-width="1.8"/>')
    for step, bits in evaluations:
        out.append(f'<circle cx="{x(step):.1f}" cy="{y(bits):.1f}" r="4" fill="#c44"/>')
        out.append(f'<text x="{x(step) - 8:.1f}" y="{y(bits) - 8:.1f}" text-anchor="end" fill="#c44">held out: {bits:.3f} bits per byte</text>')
    out.append(f'<text x="{LEFT + 8}" y="{TOP + 14}" fill="#1f6fb4">training loss, bits per byte, mean of {WINDOW} steps</text>')
    return "\n".join(out + ["</svg>"]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    svg = draw(*read(sys.argv[1]), sys.argv[3] if len(sys.argv) > 3 else "Training")
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        file.write(svg)
