"""What each of our choices buys on a CPU: the same networks with the choices added one by one.

Needs no checkpoint: random weights of the published sizes. `python -m benchmarks.changes '{...}'` is one
variant, in a process of its own; it prints its figures as one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    dtype: str = "float32"
    channels_last: bool = False
    long_attention: bool = False  # by matrix products instead of torch's kernel
    size: int = 512  # pixels along a side


def variants(size: int) -> list[Variant]:
    return [
        Variant(name="plain float32", size=size),
        Variant(name="bfloat16", dtype="bfloat16", size=size),
        Variant(name="bfloat16, channels last", dtype="bfloat16", channels_last=True, size=size),
        Variant(
            name="bfloat16, channels last, long attention by products",
            dtype="bfloat16", channels_last=True, long_attention=True, size=size,
        ),
    ]  # fmt: skip


def measure(variant: Variant) -> dict[str, Any]:
    """Seconds of a UNet forward with guidance, and of a decode, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.changes", json.dumps(asdict(variant))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return {"side": f"ours, {variant.name}", **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    variant = Variant(**json.loads(sys.argv[1]))
    import torch
    from torch import nn

    from backend.nn import layers
    from backend.nn.autoencoder import Autoencoder, AutoencoderConfig
    from backend.sd15.unet import UNet, UNetConfig
    from benchmarks.checkpoint import UNET, VAE

    if not variant.long_attention:
        layers.LONG = sys.maxsize
    dtype = getattr(torch, variant.dtype)
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format

    def ready(build: Callable[[], nn.Module]) -> Any:
        with torch.device("meta"):
            module = build()
        module = module.to_empty(device="cpu").to(dtype).requires_grad_(False).eval()
        for parameter in module.parameters():
            parameter.data = parameter.normal_(0, 0.02).contiguous(
                memory_format=layout if parameter.ndim == 4 else torch.contiguous_format
            )
        return module

    def timed(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(ROUNDS + 1):  # the first is not counted
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
        return median(seconds[1:])

    side = variant.size // 8
    latents = torch.randn(2, 4, side, side, dtype=dtype).to(memory_format=layout)
    context, timesteps = torch.randn(2, 77, 768, dtype=dtype), torch.full((2,), 500.0)
    unet = ready(lambda: UNet(UNetConfig.from_dict(UNET)))
    step_s = timed(lambda: unet(latents, timesteps, context))
    vae = ready(lambda: Autoencoder(AutoencoderConfig.from_dict(VAE)))
    print(json.dumps({"step_s": step_s, "decode_s": timed(lambda: vae.decode(latents[:1]))}))


if __name__ == "__main__":
    main()
