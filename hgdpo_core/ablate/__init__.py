"""The paper's comparisons from one shared pool (arXiv:2405.20216v1, Tables 2, 3, 5, 6, Figures 5b, 6, 8).

    settings.py arms.py     what is compared: arms, and the tables they stand in
    program.py measure.py   train, draw, score and measure every arm and training seed; what is finished is found
    estimates.py            means over seeds with intervals, by resampling prompts and seeds
    tables.py claims.py     the paper's table shapes, its numbers beside ours; which of its trends hold
    charts.py page.py       PNG plots, tables.md, one HTML page
    paper.py                the paper's own numbers
"""
