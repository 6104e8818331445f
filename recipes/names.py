"""The names of the zoo's own models by task, for a check that needs no torch; a test compares them."""

from __future__ import annotations

MODELS = {
    "classification": (
        "agent_cswin_base", "agent_cswin_base_384", "agent_cswin_small", "agent_cswin_tiny",
        "agent_deit_base", "agent_deit_small", "agent_deit_small_448", "agent_deit_tiny",
        "agent_digits", "agent_pvt_large", "agent_pvt_medium", "agent_pvt_medium_256",
        "agent_pvt_small", "agent_pvt_tiny", "agent_swin_base", "agent_swin_base_384",
        "agent_swin_small", "agent_swin_small_288", "agent_swin_tiny", "biformer_base",
        "biformer_digits", "biformer_small", "biformer_stl", "biformer_stl_nchw", "biformer_tiny",
        "dat_base", "dat_base_384", "dat_digits", "dat_p", "dat_plus_base", "dat_plus_base_384",
        "dat_plus_small", "dat_plus_tiny", "dat_small", "dat_tiny", "davit_base", "davit_base_fl",
        "davit_digits", "davit_giant", "davit_huge", "davit_huge_fl", "davit_large",
        "davit_large_window12_384", "davit_small", "davit_tiny", "dinat_base", "dinat_isotropic_base",
        "dinat_isotropic_small", "dinat_large",
        "dinat_large_21k", "dinat_large_21k_11x11", "dinat_large_384", "dinat_large_384_11x11",
        "dinat_mini", "dinat_s_base", "dinat_s_large", "dinat_s_large_21k", "dinat_s_large_384",
        "dinat_s_small", "dinat_s_tiny", "dinat_small", "dinat_tiny", "nat_base", "nat_digits",
        "nat_isotropic_base", "nat_isotropic_small", "nat_mini", "nat_small", "nat_tiny",
        "vitrpb_base", "vitrpb_small",
    ),
    "generation": (
        "dit_b_2", "dit_b_4", "dit_b_8", "dit_digits", "dit_l_2", "dit_l_4", "dit_l_8", "dit_s_2",
        "dit_s_4", "dit_s_8", "dit_xl_2", "dit_xl_4", "dit_xl_8", "mmdit_b", "mmdit_digits",
        "mmdit_l", "mmdit_s", "mmdit_xl", "video_dit_b", "video_dit_l", "video_dit_s", "video_dit_xl",
    ),
}  # fmt: skip
