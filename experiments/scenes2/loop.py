"""What the two stages share: parallel workers, optimisers, learning rate, checkpoints, logs."""

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Muon:
    """`torch.optim.Muon` (Nesterov momentum, update of AdamW's size), all matrices of a shape in one batched product.

    Args:
        parameters: matrices.
        decay: decoupled weight decay.
        momentum: of the gradients.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float, momentum: float = 0.95):
        self.decay, self.momentum, self.rate = decay, momentum, 0.0
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.state = {s: torch.zeros(len(group), *s, device=group[0].device) for s, group in self.groups.items()}

    @torch.no_grad()
    def step(self) -> None:
        for shape, group in self.groups.items():
            gradient, buffer = torch.stack([p.grad for p in group]), self.state[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(buffer, self.momentum)
            tall = shape[0] > shape[1]
            x = x.mT if tall else x
            x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).bfloat16()
            for _ in range(5):  # Newton-Schulz towards the nearest orthogonal matrix
                gram = x @ x.mT
                gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
                x = torch.baddbmm(x, gram, x, beta=3.4445)
            x = (x.mT if tall else x).float() * (0.2 * max(shape) ** 0.5)
            for p, update in zip(group, x, strict=True):
                p.mul_(1 - self.rate * self.decay).sub_(update, alpha=self.rate)

    def state_dict(self) -> dict:
        return {"x".join(map(str, shape)): value for shape, value in self.state.items()}

    def load_state_dict(self, state: dict) -> None:
        for shape, value in self.state.items():
            value.copy_(state["x".join(map(str, shape))])


class Optimizers:
    """Muon for the matrices inside the transformer layers, AdamW for the rest; warm-up, then cosine to zero.

    Args:
        model: the parameters.
        matrices: says by name whether a 2-D parameter belongs to Muon.
        rate: learning rate at the top, for both (Muon's update is scaled to AdamW's size).
        steps: length of the schedule.
        decay: weight decay of the matrices.
    """

    def __init__(self, model: nn.Module, matrices, rate: float, steps: int, decay: float = 0.02, warmup: int = 100):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        hidden = [p for n, p in named if p.ndim == 2 and matrices(n)]
        others = [p for n, p in named if not (p.ndim == 2 and matrices(n))]
        self.parameters = [p for _, p in named]
        self.muon = Muon(hidden, decay)
        self.adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.rate, self.steps, self.warmup = rate, steps, warmup

    def step(self, step: int) -> float:
        """Average the gradients over the workers, clip, update; returns the gradient's norm."""
        flat = torch.cat([p.grad.flatten() for p in self.parameters])
        if dist.is_initialized():
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
        norm = flat.norm()
        flat *= (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for p, g in zip(self.parameters, flat.split([p.numel() for p in self.parameters]), strict=True):
            p.grad.copy_(g.view_as(p))
        share = min((step + 1) / self.warmup, 1) * 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1)))
        self.muon.rate = self.adam.param_groups[0]["lr"] = self.rate * max(share, 1e-3)
        self.muon.step()
        self.adam.step()
        for p in self.parameters:
            p.grad.zero_()
        return norm.item()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def save(path: Path, content: dict) -> None:
    """Write a checkpoint so that a kill never leaves half of one."""
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


class Log:
    """One JSON line per record, in a file and on the screen; silent on all workers but the first."""

    def __init__(self, path: Path, rank: int):
        self.path, self.rank, self.start = path, rank, time.time()

    def __call__(self, **record) -> None:
        if self.rank == 0:
            record = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
            record["seconds"] = round(time.time() - self.start)
            line = json.dumps(record)
            with self.path.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)


def _enter(rank: int, workers: int, port: int, function, arguments) -> None:
    torch.set_num_threads(1 if workers > 1 else os.cpu_count())
    if workers > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    try:
        function(rank, workers, *arguments)
    finally:
        if workers > 1:
            dist.destroy_process_group()


def launch(function, *arguments, workers: int, port: int = 29571) -> None:
    """Run `function(rank, workers, *arguments)` in single-threaded processes that average their gradients."""
    if workers == 1:
        _enter(0, 1, port, function, arguments)
    else:
        mp.spawn(_enter, (workers, port, function, arguments), nprocs=workers)
