"""The paper's results (arXiv:2405.20216v1): photographs of people at 704x1024, 177 PartiPrompts, one training each.

Table 5's rows L-2, L-5 and L-10 repeat Table 3's N-2, N-5 and N-10 to the digit: one of the two is a copying error, so
they are one measurement, not two (METHOD, section 8).
"""

Row = tuple[float, float, float, float, float]
"""Win rates against the target in percent, by PickScore, HPS, ImageReward, LAION aesthetic and CLIP."""

TABLE_1: dict[str, Row] = {
    "Pick-a-Pic v2": (83.05, 80.68, 75.71, 62.71, 68.93),
    "Pick-a-Pic v2 (H)": (85.31, 78.53, 75.14, 63.28, 68.36),
    "HPD v2": (88.14, 82.95, 76.27, 63.28, 71.19),
    "HPD v2 (H)": (86.44, 79.89, 77.97, 62.15, 72.32),
    "SFT on winners": (74.58, 78.16, 70.06, 50.85, 67.23),
    "beta x4": (76.27, 74.71, 70.62, 46.89, 63.84),
    "beta x20": (81.36, 82.29, 75.14, 63.84, 66.10),
    "AlignProp": (39.55, 65.91, 64.41, 16.95, 74.01),
}
"""Win rates of HG-DPO (N-20-SML) against models tuned otherwise."""
TABLE_4 = {"pickscore": 89.25, "hps": 88.07, "imagereward": 91.75, "aesthetic": 65.75, "clip": 85.0, "arcface": 49.5,
           "vggface": 50.5}
"""Win rates of a personalised model (InstantBooth) with HG-DPO against the same without; 20 people, 20 prompts."""
TABLE_3: dict[str, Row] = {
    "N-2": (66.10, 67.63, 63.84, 55.37, 54.24),
    "N-5": (81.92, 77.14, 66.67, 68.36, 72.32),
    "N-10": (84.18, 84.57, 74.01, 75.14, 69.49),
    "N-20": (88.70, 89.77, 76.84, 75.14, 74.01),
    "N-20-LAN": (89.27, 86.86, 76.84, 66.10, 72.88),
    "N-20-SML": (85.31, 85.71, 79.10, 63.84, 68.36),
}
TABLE_5: dict[str, Row] = {
    "N-20-L-2": (66.10, 67.63, 63.84, 55.37, 54.24),
    "N-20-L-5": (81.92, 77.14, 66.67, 68.36, 72.32),
    "N-20-L-10": (84.18, 84.57, 74.01, 75.14, 69.49),
    "N-20-L-20": (88.70, 89.77, 76.84, 75.14, 74.01),
}
TABLE_6: dict[str, Row] = {
    "N-20-2k": (74.58, 79.66, 73.45, 74.01, 58.19),
    "N-20-50k": (85.88, 86.29, 76.27, 72.88, 70.06),
    "N-20-100k": (88.70, 89.77, 76.84, 75.14, 74.01),
}
TABLE_6_ROWS = {0.02: "N-20-2k", 0.5: "N-20-50k", 1.0: "N-20-100k"}
"""Fraction of the whole data set -> its row."""

TABLE_2: dict[str, tuple[float, float, float]] = {
    "N-2": (6.59, 4.50, 1.32),
    "N-10": (20.94, 5.54, 3.94),
    "N-20": (24.93, 12.52, 3.43),
    "N-20 (beta x4)": (17.62, 7.99, 3.01),
    "N-20 (beta x20)": (1.39, 2.86, 0.69),
    "N-20-LAN": (0.20, 2.03, 0.61),
    "N-20-SML": (1.67, 0.74, 1.05),
}
"""Change of hue, saturation and value in percent, without sign."""
COPYING_ERROR = ("The paper's rows L-2, L-5 and L-10 of Table 5 repeat N-2, N-5 and N-10 of Table 3 to the digit: one "
                 "of them is a copying error, so they are not two measurements.")
