"""User studies: people compare images of two or more models, one question at a time (arXiv:2405.20216v1, Figure 3).

`votes.py` is what both sides share: the columns of pairs and votes.
"""
