"""Measurements of kvdrift itself: `./run bench [NAME ...]`. Ratios within one run, since machines are noisy."""
