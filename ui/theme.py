"""The look: paper and ink, one colour. assets/style.css has the layout and reads the variables set here."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parent.parent / "assets"
STYLE = ASSETS / "style.css"
PAGE = ASSETS / "page.js"
ICON = ASSETS / "favicon.svg"

VERMILION = gr.themes.Color(
    name="vermilion",
    c50="#fdf3f0",
    c100="#fae3dc",
    c200="#f4c4b7",
    c300="#ec9d88",
    c400="#e27457",
    c500="#cf5334",
    c600="#b23f22",
    c700="#93341d",
    c800="#782e1d",
    c900="#632a1e",
    c950="#36130b",
)
INK = gr.themes.Color(
    name="ink",
    c50="#f7f6f3",
    c100="#edebe6",
    c200="#dedbd3",
    c300="#c2beb4",
    c400="#98938a",
    c500="#6d6962",
    c600="#54514c",
    c700="#3d3b38",
    c800="#282725",
    c900="#1c1b1a",
    c950="#141413",
)
SANS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def theme() -> gr.themes.Base:
    """Flat: no boxes around controls, fields with a hairline, one filled button."""
    base = gr.themes.Base(
        primary_hue=VERMILION,
        secondary_hue=INK,
        neutral_hue=INK,
        font=SANS,
        font_mono=MONO,
        radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_900",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_700",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="*neutral_800",
        block_background_fill="*body_background_fill",
        block_background_fill_dark="*body_background_fill",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_border_width_dark="0px",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0px",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_300",
        block_title_text_size="*text_sm",
        block_title_text_weight="500",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        block_info_text_size="*text_xs",
        form_gap_width="0px",
        layout_gap="16px",
        input_background_fill="#ffffff",
        input_background_fill_dark="*neutral_900",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        input_shadow="none",
        input_shadow_dark="none",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        slider_color="*primary_500",
        slider_color_dark="*primary_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_800",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_700",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_200",
        button_border_width="1px",
        button_border_width_dark="1px",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_500",
        checkbox_border_color_selected="*primary_600",
        checkbox_border_color_selected_dark="*primary_500",
    )
