"""The paper's comparisons from one shared pool (arXiv:2405.20216v1, Tables 2, 3, 5, 6, Figures 5b, 6, 8).

    settings.py arms.py     what is compared: arms, and the rows of tables that show them
    cost.py                 all counts of an ablation, before it runs
    program.py measure.py   train, sample, score and measure every arm and training seed
    result.py               means over prompts and seeds with intervals, by resampling both
    tables.py claims.py     the paper's tables with our numbers; which of its trends hold
    charts.py conclude.py   PNG plots, tables.md, result.json, one HTML page
    paper.py                the paper's own results
"""
