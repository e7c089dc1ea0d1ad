"""A report on runs as one HTML file that needs no network: curves, account, data, differences.

collect      reads the folders of the runs
series       metrics in few points, with the extremes that the points hide
goodput      wall time by activity
data_card    the data of a run, from its prepared folders
results      files of evaluations, scores and certificates that are given along
tags         HTML from texts
sections     the parts of the page that need no script
page         the page: page.css, page.js, sections and the points of the curves
"""
