"""How to send tokens to experts, and what MALoRA's shared basis saves: times for methods/malora.py.

    python -m benchmarks.dispatch layers     four ways to compute one layer's experts, forward and backward
    python -m benchmarks.dispatch steps      MoLoRA against MALoRA (and LoRA) at an equal budget, a training step each

The four ways, of `Σ_{t in T} g_t B_t P_t z` for tokens z (MoLoRA: z = x and P = A; MALoRA: z = S x):

    masked     every expert for every token as two products, the gates a mask between them (what methods/malora.py does)
    grouped    pairs of token and expert sorted by expert, one product per expert on its slice, added up per token
    loop       for each expert in turn, the tokens that chose it
    gathered   each token gathers the factors of its own experts

One thread (`OMP_NUM_THREADS=1` is what a worker has); the median of rounds in which the contenders take turns, so that
what else the machine does hits all of them alike.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

EXPERTS, KEPT = 8, 2
#: Name, inputs, outputs, tokens.
LAYERS = [("MiniLM up", 384, 1536, 512), ("SmolLM2 up", 576, 1536, 512), ("SmolLM2 down", 1536, 576, 512),
          ("Llama q", 4096, 4096, 256)]
ROUNDS = 15

Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def masked(z: Tensor, P: Tensor, B: Tensor, g: Tensor, chosen: Tensor) -> Tensor:
    """z `[tokens, d]`, P `[N, rank, d]`, B `[out, N, rank]`, g `[tokens, N]` (zero where not kept), chosen `[tokens, K]`."""
    down = (z @ P.flatten(0, 1).mT).unflatten(1, P.shape[:2]) * g[..., None]
    return down.flatten(1) @ B.flatten(1).mT


def grouped(z: Tensor, P: Tensor, B: Tensor, g: Tensor, chosen: Tensor) -> Tensor:
    order = chosen.flatten().argsort(stable=True)
    tokens = order // chosen.shape[1]
    counts = chosen.flatten().bincount(minlength=len(P)).tolist()
    weights = g.gather(1, chosen).flatten()[order, None]
    pieces = [part @ P[t].mT for t, part in enumerate(z[tokens].split(counts))]
    down = (torch.cat(pieces) * weights).split(counts)
    parts = [part @ B[:, t].mT for t, part in enumerate(down)]
    return z.new_zeros(len(z), len(B)).index_add(0, tokens, torch.cat(parts))


def loop(z: Tensor, P: Tensor, B: Tensor, g: Tensor, chosen: Tensor) -> Tensor:
    out = z.new_zeros(len(z), len(B))
    for t in range(len(P)):
        rows = (chosen == t).any(1).nonzero()[:, 0]
        out = out.index_add(0, rows, (z[rows] @ P[t].mT * g[rows, t, None]) @ B[:, t].mT)
    return out


def gathered(z: Tensor, P: Tensor, B: Tensor, g: Tensor, chosen: Tensor) -> Tensor:
    down = torch.einsum("td,tkrd->tkr", z, P[chosen]) * g.gather(1, chosen)[..., None]
    return torch.einsum("tkr,tkor->to", down, B.transpose(0, 1)[chosen])


WAYS: dict[str, Way] = {"masked": masked, "grouped": grouped, "loop": loop, "gathered": gathered}


def layers() -> None:
    """Milliseconds, forward + backward, of the experts and their shared basis (the router is the same for all)."""
    print(f"{'layer':28}{'method':22}" + "".join(f"{way:>16}" for way in WAYS))
    for name, inputs, outputs, tokens in LAYERS:
        for method, rank, d in (("MoLoRA r=8", 8, None), ("MALoRA r=12 d=32", 12, 32)):
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(tokens, inputs, generator=draw).requires_grad_()
            S = None if d is None else torch.randn(d, inputs, generator=draw).requires_grad_()
            P = torch.randn(EXPERTS, rank, d or inputs, generator=draw).requires_grad_()
            B = torch.randn(outputs, EXPERTS, rank, generator=draw).requires_grad_()
            logits = torch.randn(tokens, EXPERTS, generator=draw)
            chosen = logits.topk(KEPT).indices
            g = (logits.softmax(-1) * torch.zeros_like(logits).scatter(1, chosen, 1.0)).requires_grad_()
            upstream = torch.randn(tokens, outputs, generator=draw)
            times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            expected = None
            for _ in range(ROUNDS):
                for way, compute in WAYS.items():
                    start = time.perf_counter()
                    out = compute(x if S is None else x @ S.mT, P, B, g, chosen)
                    middle = time.perf_counter()
                    out.backward(upstream)
                    times[way].append((middle - start, time.perf_counter() - middle))
                    expected = out.detach() if expected is None else expected
                    torch.testing.assert_close(out.detach(), expected, rtol=1e-3, atol=1e-2)
            cells = [" + ".join(f"{1e3 * statistics.median(part):.1f}" for part in zip(*times[way], strict=True))
                     for way in WAYS]
            print(f"{f'{name} {inputs}x{outputs}, {tokens}':28}{method:22}" + "".join(f"{cell:>16}" for cell in cells))


def steps() -> None:
    """Seconds of one training step, and its parts, on the packaged bases at the budget of MoLoRA of rank 8."""
    from suite import bases, budget, objectives, registry
    from suite.batches import Encoded, EncodedSet, collate
    from suite.method import Start
    from suite.optimiser import PackedAdamW
    from suite.packing import Head, Packed
    from suite.specs import Budget, Recipe

    cpu, names, rounds = torch.device("cpu"), ("lora", "molora", "malora"), 7
    for base_id, task_id, rows, length in (("minilm", "movie-sentiment", 16, 32), ("smollm2-135m", "asdiv", 4, 64)):
        base, task = bases.get(base_id), registry.task(task_id)
        loaded, shapes = bases.load(base), bases.shapes(base, task)
        draw = torch.Generator().manual_seed(0)
        texts = torch.randint(1000, 2000, (rows, length), generator=draw).tolist()
        classes = task.kind == "classification"
        data = EncodedSet([Encoded(t, target=0 if classes else 8, label=0) for t in texts], 0, 0)
        batch = collate(data, [range(rows)], cpu)
        times: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
        trained = {}
        configs = {name: budget.fit(registry.method(name), registry.method(name).Config(), Budget(like="molora@8"), shapes)
                   for name in names}
        for turn in range(1 + rounds):
            for name in names:
                method = registry.method(name)
                trained[name] = method.trainable(configs[name], shapes)
                head = Head(loaded.hidden_size, len(task.labels), 1, ("dispatch",)) if classes else None
                packed = Packed(loaded.model, method, shapes, [Start(configs[name], 0)], head)
                adamw = PackedAdamW(packed.parameters(), 1, [1e-4], Recipe(learning_rate=1e-4))
                marks = []
                for _ in range(2):  # the first step warms up
                    marks = [time.perf_counter()]
                    packed.see(batch.mask)
                    loss = (objectives.language_loss(packed.model, 1, batch) if head is None
                            else objectives.classification_loss(packed.model, head, batch))
                    penalty = packed.penalty()
                    marks.append(time.perf_counter())
                    (loss if penalty is None else loss + penalty).sum().backward()
                    marks.append(time.perf_counter())
                    adamw.step(loss.detach(), 1.0)
                    adamw.drop_gradients()
                    marks.append(time.perf_counter())
                packed.detach()
                if turn:
                    times[name].append(tuple(b - a for a, b in itertools.pairwise(marks)))
        print(f"{base.title}: {rows} x {length} tokens a step")
        for name in names:
            parts = [statistics.median(part) for part in zip(*times[name], strict=True)]
            total = statistics.median(sum(one) for one in times[name])
            print(f"  {registry.method(name).label:8} rank {configs[name].rank:3}  {trained[name]:>12,} trained  "
                  f"step {total:.3f} s = forward {parts[0]:.3f} + backward {parts[1]:.3f} + optimiser {parts[2]:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["layers", "steps"]
    for what in wanted:
        {"layers": layers, "steps": steps}[what]()
