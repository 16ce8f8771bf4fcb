"""Parameters that papers publish for named models. They are valid only for these models and numbers of steps."""

from __future__ import annotations

TEACACHE = {
    "flux": (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    "flux-kontext": (-1.04655119e03, 3.12563399e02, -1.69500694e01, 4.10995971e-01, 3.74537863e-02),
    "hunyuan-video": (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    "ltx-video": (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03),
    "lumina2": (-8.74643948e02, 4.66059906e02, -7.51559762e01, 5.32836175e00, -3.27258296e-02),
}
"""TeaCache's polynomials, highest power first. Wan's are left out: they take the timestep embedding, which is not
available as a probe."""

MAGCACHE = {
    "flux": (
        1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125,
        1.02344, 0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0,
        0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062,
    ),
}  # fmt: skip
"""MagCache's magnitude ratios, one for each of 28 steps."""

MEANCACHE = {
    "qwen-image-25": (*range(17), 24, 32, 40, 43, 45, 47, 48, 49),
    "qwen-image-17": (*range(9), 10, 17, 24, 31, 38, 45, 48, 49),
    "qwen-image-10": (0, 1, 3, 7, 14, 21, 28, 35, 42, 49),
    "qwen-image-2512-25": (*range(16), 23, 31, 37, *range(44, 50)),
    "qwen-image-2512-17": (*range(10), 11, 19, 27, 35, 43, 47, 49),
    "qwen-image-2512-10": (0, 2, 4, 7, 14, 21, 28, 35, 42, 49),
    "z-image-13": (0, 1, 2, 3, 5, 9, 15, 22, 29, 36, 43, 47, 49),
}
"""MeanCache's plans: the computed steps, of 50."""
