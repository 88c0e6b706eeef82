"""What the fields of a request mean, for who calls the endpoints: programs, and language models by MCP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from backend import catalog
from backend.requests import DTYPES, LEAST_TOKENS, MAX_SEED, MOST_TOKENS, PREFERENCES, STAGES, T5, Request
from backend.sampling.catalog import FLOW_SAMPLER_INFO, SAMPLER_INFO

NAMES = {
    "sd15": "Stable Diffusion 1.5",
    "sd3": "Stable Diffusion 3 and 3.5",
    "stable_cascade": "Stable Cascade",
}
OWN = "Left out: the checkpoint's own."
STEPS, SCALE = f"1 to 150. {OWN}", f"How closely to follow the prompt, 0 to 30. {OWN}"


def describe(family: type[Request]) -> str:
    """A docstring for the family's endpoint, in the form that Gradio reads."""
    known = _meanings(family)
    lines = [
        f"Paint pictures from a text with {NAMES[family.family]}.",
        "The built-in demo checkpoint paints flat postcards of landscapes, the others anything.",
        "Parameters:",
        *(f"  {field.name}: {known[field.name]}" for field in fields(family)),
        "Returns:",
        "  the PNG files, in the order of their seeds",
        "  their seeds, settings, memory plan and timings",
    ]
    return "\n".join(lines)


def _meanings(family: type[Request]) -> dict[str, str]:
    checkpoints, multiple = ", ".join(catalog.names(family.family)), family.size_multiple
    samplers = FLOW_SAMPLER_INFO if family.family == "sd3" else SAMPLER_INFO
    return {
        "prompt": "What to paint, in English.",
        "negative_prompt": "What to keep out of the picture.",
        "checkpoint": f"{checkpoints}; where the server allows it a hub repository, folder or file, too.",
        "seed": f"0 to {MAX_SEED}; the same seed and settings paint the same picture. -1: one at random.",
        "num_images": "1 to 8; each uses the seed after the one before.",
        "width": f"Pixels, 64 to 2048 in multiples of {multiple}. {OWN}",
        "height": f"Pixels, 64 to 2048 in multiples of {multiple}. {OWN}",
        "dtype": f"The precision to compute in: {_or(DTYPES)}.",
        "prefer": f"What to give up where memory is short: {_or(PREFERENCES)}.",
        "loras": "LoRAs that the server has: pairs of a name and a weight, -10 to 10. A prompt can name "
        "them, too: <lora:name:0.8>.",
        "raw_prompt": "Take the prompt as it is, without weights in brackets, cut to what the encoder reads.",
        "clip_skip": "How many of the text encoder's last layers to leave out, 0 to 11.",
        "config_from": "A folder or repository that completes a checkpoint of a single file.",
        "steps": STEPS,
        "guidance_scale": SCALE,
        "sampler": f"{_or(samplers)}. {OWN}",
        "shift": f"0.1 to 20: higher spends more of the steps on composition, lower on detail. {OWN}",
        "t5": f"How the largest text encoder runs: {_or(T5)}.",
        "max_sequence_length": f"Tokens of the prompt that it reads, {LEAST_TOKENS} to {MOST_TOKENS}.",
        "skip_layer_guidance_scale": "0 (off) to 10: leads away from what is painted without some blocks.",
        "skip_layer_guidance_start": "The share of the steps after which that begins, 0 to 1.",
        "skip_layer_guidance_stop": "The share of the steps after which that ends, 0 to 1.",
        "skip_guidance_layers": "The numbers of those blocks. Left out: 7, 8 and 9.",
        "prior_steps": f"Of Stage C, which composes: {STEPS}",
        "prior_guidance_scale": f"Of Stage C: {SCALE}",
        "decoder_steps": f"Of Stage B, which draws: {STEPS}",
        "decoder_guidance_scale": f"Of Stage B: {SCALE}",
        "stages": f"The size of both stages: {_or(STAGES)}.",
        "stage_c": f"The size of Stage C, over `stages`: {_or(STAGES)}.",
        "stage_b": f"The size of Stage B, over `stages`: {_or(STAGES)}.",
        "images": "0 to 4 pictures to make variations of: uploaded files, or data URLs.",
    }


def _or(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
