"""Statistics of images and scores: intervals, colours, diversity, distributions, and checks of a tuning by them."""
