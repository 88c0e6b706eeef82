"""What the page says about each sampler. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplerInfo:
    """One sampler as a person meets it.

    label: the widely used name, written to the `parameters` text of a picture.
    cost: forwards of the network a step.
    """

    name: str
    label: str
    recommended_steps: int
    cost: float
    note: str


def _info(name: str, label: str, recommended_steps: int, cost: float, note: str) -> SamplerInfo:
    return SamplerInfo(name=name, label=label, recommended_steps=recommended_steps, cost=cost, note=note)


SAMPLER_INFO: dict[str, SamplerInfo] = {
    info.name: info
    for info in (
        _info("pndm", "PLMS", 50, 1, "The published default of Stable Diffusion 1.5."),
        _info("ddim", "DDIM", 30, 1, "Plain and predictable."),
        _info("euler", "Euler", 25, 1, "Simple, soft pictures."),
        _info("euler_ancestral", "Euler a", 25, 1, "Adds noise at each step: other steps, other picture."),
        _info("heun", "Heun", 15, 2, "Second order: two forwards a step, fewer steps."),
        _info("dpmpp_2m", "DPM++ 2M", 20, 1, "Fast and sharp; a good first choice."),
        _info(
            "dpmpp_2m_karras", "DPM++ 2M Karras", 20, 1, "DPM++ 2M with more of its steps spent on detail."
        ),
        _info("dpmpp_2m_sde_karras", "DPM++ 2M SDE Karras", 25, 1, "Adds noise at each step: rich texture."),
        _info("unipc", "UniPC", 15, 1, "Corrects each step: good with very few."),
        _info("lcm", "LCM", 4, 1, "Only for checkpoints distilled for it, at guidance 1 to 2."),
    )
}


# The samplers that rectified flow (Stable Diffusion 3) knows; the first is its published default.
FLOW_SAMPLER_INFO: dict[str, SamplerInfo] = {
    info.name: info
    for info in (
        _info("euler", "Euler", 28, 1, "The published default of Stable Diffusion 3."),
        _info("heun", "Heun", 15, 2, "Second order: two forwards a step, fewer steps."),
        _info("dpmpp_2m", "DPM++ 2M", 20, 1, "Second order from one forward a step: sharper with few steps."),
    )
}
